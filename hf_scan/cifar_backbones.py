# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The paper's networks for 32x32 images, registered with timm under `cifar_*` like any other model."""

from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn


class CifarResNet(nn.Module):
    """
    A residual network for small images: a 3x3 stem without pooling, then stages that halve the map from the second
    on, of timm's own residual blocks.

    The wide form (stages of 64, 128, 256 and 512 channels) is the one of the SCAN authors' code; the narrow form
    (16, 32, 64) is section 4.2 of [Deep Residual Learning](https://arxiv.org/abs/1512.03385), with projection
    shortcuts where the shape changes.

    Args:
        block (`type`): `BasicBlock` or `Bottleneck` of timm.
        layers (`tuple[int, ...]`): Number of blocks in each stage.
        channels (`tuple[int, ...]`): Width of each stage before the block's expansion.
        num_classes (`int`, *optional*, defaults to 100): Outputs of the classifier; 0 for none.
        in_chans (`int`, *optional*, defaults to 3): Channels of the image.
        global_pool (`str`, *optional*, defaults to `"avg"`): Pooling before the classifier, as in timm.
        drop_rate (`float`, *optional*, defaults to 0.0): Dropout before the classifier.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        channels: tuple[int, ...],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        width = channels[0]
        self.conv1 = nn.Conv2d(in_chans, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)

        self.feature_info: list[dict[str, Any]] = []
        self.stage_names: list[str] = []
        reduction = 1
        for index, (depth, planes) in enumerate(zip(layers, channels)):
            stride = 1 if index == 0 else 2
            reduction *= stride
            name = f"layer{index + 1}"
            blocks = []
            for position in range(depth):
                blocks.append(_block(block, width, planes, stride if position == 0 else 1))
                width = planes * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
            self.stage_names.append(name)
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})

        self.num_features = self.head_hidden_size = width
        self.global_pool, self.head_drop, self.fc = create_classifier(
            width, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool or self.global_pool.pool_type
        )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            stage = self.get_submodule(name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _block(block: type[BasicBlock] | type[Bottleneck], inplanes: int, planes: int, stride: int) -> nn.Module:
    outplanes = planes * block.expansion
    shortcut = None
    if stride != 1 or inplanes != outplanes:
        shortcut = nn.Sequential(
            nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
        )
    return block(inplanes, planes, stride=stride, downsample=shortcut)


# Channel means and standard deviations of CIFAR-100's train images.
_CFG = {
    "url": "",
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}.untrained": dict(_CFG) for depth in (18, 20, 34, 50, 101, 152)}
)


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    stages = tuple(range(len(kwargs["layers"])))
    return build_model_with_cfg(CifarResNet, variant, pretrained, feature_cfg={"out_indices": stages}, **kwargs)


_WIDE, _NARROW = (64, 128, 256, 512), (16, 32, 64)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32x32 images, 11.2 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (2, 2, 2, 2), "channels": _WIDE, **kwargs}
    return _create_cifar_resnet("cifar_resnet18", pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32x32 images, 0.28 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (3, 3, 3), "channels": _NARROW, **kwargs}
    return _create_cifar_resnet("cifar_resnet20", pretrained, **kwargs)


@register_model
def cifar_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 for 32x32 images, 21.3 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (3, 4, 6, 3), "channels": _WIDE, **kwargs}
    return _create_cifar_resnet("cifar_resnet34", pretrained, **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 for 32x32 images, 23.7 M parameters."""
    kwargs = {"block": Bottleneck, "layers": (3, 4, 6, 3), "channels": _WIDE, **kwargs}
    return _create_cifar_resnet("cifar_resnet50", pretrained, **kwargs)


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 for 32x32 images, 42.7 M parameters."""
    kwargs = {"block": Bottleneck, "layers": (3, 4, 23, 3), "channels": _WIDE, **kwargs}
    return _create_cifar_resnet("cifar_resnet101", pretrained, **kwargs)


@register_model
def cifar_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 for 32x32 images, 58.3 M parameters."""
    kwargs = {"block": Bottleneck, "layers": (3, 8, 36, 3), "channels": _WIDE, **kwargs}
    return _create_cifar_resnet("cifar_resnet152", pretrained, **kwargs)
