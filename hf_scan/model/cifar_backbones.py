# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The paper's networks for 32x32 images, registered with timm under `cifar_*` like any other model."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, create_classifier, create_conv2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from torch import nn


class CifarNet(nn.Module):
    """
    What the networks share: parts that run one after another, some of them taps, and a classifier over the pooled
    feature. Each network adds its parts with [`~CifarNet.add_part`] and ends with [`~CifarNet.add_classifier`].

    Args:
        num_classes (`int`, *optional*, defaults to 100): Outputs of the classifier; 0 for none.
        in_chans (`int`, *optional*, defaults to 3): Channels of the image.
        global_pool (`str`, *optional*, defaults to `"avg"`): Pooling before the classifier, as in timm.
        drop_rate (`float`, *optional*, defaults to 0.0): Dropout before the classifier.
    """

    def __init__(
        self, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.pool_type = global_pool
        self.grad_checkpointing = False
        self.parts: list[str] = []
        self.feature_info: list[dict[str, Any]] = []

    def add_part(self, name: str, part: nn.Module) -> None:
        self.add_module(name, part)
        self.parts.append(name)

    def add_tap(self, num_chs: int, reduction: int) -> None:
        self.feature_info.append({"num_chs": num_chs, "reduction": reduction, "module": self.parts[-1]})

    def add_classifier(self, pre_logits: nn.Module | None = None, hidden_size: int | None = None) -> None:
        self.num_features = self.feature_info[-1]["num_chs"]
        self.head_hidden_size = hidden_size or self.num_features
        self.pre_logits = pre_logits or nn.Identity()
        self.global_pool, self.head_drop, self.fc = create_classifier(
            self.head_hidden_size, self.num_classes, pool_type=self.pool_type, drop_rate=self.drop_rate
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.pool_type = global_pool or self.pool_type
        self.global_pool, self.fc = create_classifier(self.head_hidden_size, num_classes, pool_type=self.pool_type)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.parts:
            part = self.get_submodule(name)
            # What reads the image itself is not recomputed: timm's checkpoints need an input with a gradient.
            if self.grad_checkpointing and x.requires_grad and isinstance(part, nn.Sequential):
                x = checkpoint_seq(part, x, every=len(part))
            else:
                x = part(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(self.pre_logits(self.global_pool(x)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class CifarResNet(CifarNet):
    """
    A residual network for small images: a 3x3 stem without pooling, then stages that halve the map from the second
    on, of timm's own residual blocks.

    The wide form (stages of 64, 128, 256 and 512 channels) is the one of the SCAN authors' code; the narrow form
    (16, 32, 64) is section 4.2 of [Deep Residual Learning](https://arxiv.org/abs/1512.03385), with projection
    shortcuts where the shape changes.

    Args:
        block (`type`): `BasicBlock` or `Bottleneck` of timm.
        layers (`Sequence[int]`): Number of blocks in each stage.
        channels (`Sequence[int]`): Width of each stage before the block's expansion.
        kwargs: As for [`CifarNet`].
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        channels: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        width = channels[0]
        self.add_part("conv1", nn.Conv2d(self.in_chans, width, kernel_size=3, padding=1, bias=False))
        self.add_part("bn1", nn.BatchNorm2d(width))
        self.add_part("act1", nn.ReLU(inplace=True))
        for index, (depth, planes) in enumerate(zip(layers, channels)):
            blocks = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(_block(block, width, planes, stride))
                width = planes * block.expansion
            self.add_part(f"layer{index + 1}", nn.Sequential(*blocks))
            self.add_tap(width, 2**index)
        self.add_classifier()


def _block(block: type[BasicBlock] | type[Bottleneck], inplanes: int, planes: int, stride: int) -> nn.Module:
    outplanes = planes * block.expansion
    shortcut = None
    if stride != 1 or inplanes != outplanes:
        shortcut = nn.Sequential(
            nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
        )
    built: nn.Module = block(inplanes, planes, stride=stride, downsample=shortcut)
    return built


class CifarWideResNet(CifarNet):
    """
    [Wide Residual Networks](https://arxiv.org/abs/1605.07146): a 3x3 stem of 16 channels and three stages of timm's
    pre-activation blocks, 16, 32 and 64 channels times `widen_factor` wide.

    Args:
        depth (`int`): Blocks in each stage.
        widen_factor (`int`): How many times wider than the narrow network.
        kwargs: As for [`CifarNet`].
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        width = 16
        self.add_part("conv1", nn.Conv2d(self.in_chans, width, kernel_size=3, padding=1, bias=False))
        for index in range(3):
            blocks = []
            for position in range(depth):
                blocks.append(
                    PreActBasic(
                        width,
                        16 * widen_factor * 2**index,
                        stride=2 if index > 0 and position == 0 else 1,
                        conv_layer=create_conv2d,
                        norm_layer=BatchNormAct2d,
                        proj_layer=DownsampleConv,
                    )
                )
                width = 16 * widen_factor * 2**index
            self.add_part(f"layer{index + 1}", nn.Sequential(*blocks))
            if index == 2:
                self.add_part("norm", BatchNormAct2d(width))
            self.add_tap(width, 2**index)
        self.add_classifier()


class CifarVGG(CifarNet):
    """
    [VGG](https://arxiv.org/abs/1409.1556) with batch norm for small images: the five groups of 3x3 convolutions, each
    with its pooling, down to one pixel, and two hidden layers of 4,096 before the classifier.

    Args:
        layers (`Sequence[int]`): Convolutions in each group.
        hidden_size (`int`, *optional*, defaults to 4096): Width of the hidden layers.
        drop_rate (`float`, *optional*, defaults to 0.5): Dropout behind each hidden layer.
        kwargs: As for [`CifarNet`].
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int = 4096,
        drop_rate: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(drop_rate=drop_rate, **kwargs)
        width = self.in_chans
        for index, (depth, planes) in enumerate(zip(layers, (64, 128, 256, 512, 512))):
            group: list[nn.Module] = []
            for _ in range(depth):
                group += [nn.Conv2d(width, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
                width = planes
            self.add_part(f"layer{index + 1}", nn.Sequential(*group, nn.MaxPool2d(2)))
            self.add_tap(width, 2 ** (index + 1))
        pre_logits = nn.Sequential(
            nn.Linear(width, hidden_size),
            nn.ReLU(inplace=True),
            nn.Dropout(drop_rate),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(inplace=True),
        )
        self.add_classifier(pre_logits, hidden_size)


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
    {
        f"cifar_{name}.untrained": dict(_CFG, **({"first_conv": "layer1.0"} if "vgg" in name else {}))
        for name in (
            *(f"resnet{depth}" for depth in (18, 20, 32, 34, 50, 56, 101, 152)),
            *("vgg16_bn", "vgg19_bn"),
            *("wrn20_8", "wrn28_10", "wrn44_8"),
        )
    }
)


def _create(network: type[CifarNet], variant: str, taps: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    network_of_timm: nn.Module = build_model_with_cfg(
        network, variant, pretrained, feature_cfg={"out_indices": tuple(range(taps))}, **kwargs
    )
    return network_of_timm


def _resnet(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return _create(CifarResNet, variant, len(kwargs["layers"]), pretrained, **kwargs)


_WIDE, _NARROW = (64, 128, 256, 512), (16, 32, 64)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for 32x32 images, 11.2 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (2, 2, 2, 2), "channels": _WIDE, **kwargs}
    return _resnet("cifar_resnet18", pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32x32 images, 0.28 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (3, 3, 3), "channels": _NARROW, **kwargs}
    return _resnet("cifar_resnet20", pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32x32 images, 0.47 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (5, 5, 5), "channels": _NARROW, **kwargs}
    return _resnet("cifar_resnet32", pretrained, **kwargs)


@register_model
def cifar_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 for 32x32 images, 21.3 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (3, 4, 6, 3), "channels": _WIDE, **kwargs}
    return _resnet("cifar_resnet34", pretrained, **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 for 32x32 images, 23.7 M parameters."""
    kwargs = {"block": Bottleneck, "layers": (3, 4, 6, 3), "channels": _WIDE, **kwargs}
    return _resnet("cifar_resnet50", pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32x32 images, 0.86 M parameters."""
    kwargs = {"block": BasicBlock, "layers": (9, 9, 9), "channels": _NARROW, **kwargs}
    return _resnet("cifar_resnet56", pretrained, **kwargs)


@register_model
def cifar_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 for 32x32 images, 42.7 M parameters."""
    kwargs = {"block": Bottleneck, "layers": (3, 4, 23, 3), "channels": _WIDE, **kwargs}
    return _resnet("cifar_resnet101", pretrained, **kwargs)


@register_model
def cifar_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 for 32x32 images, 58.3 M parameters."""
    kwargs = {"block": Bottleneck, "layers": (3, 8, 36, 3), "channels": _WIDE, **kwargs}
    return _resnet("cifar_resnet152", pretrained, **kwargs)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with batch norm for 32x32 images, 34.0 M parameters."""
    return _create(CifarVGG, "cifar_vgg16_bn", 5, pretrained, **{"layers": (2, 2, 3, 3, 3), **kwargs})


@register_model
def cifar_vgg19_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 with batch norm for 32x32 images, 39.3 M parameters."""
    return _create(CifarVGG, "cifar_vgg19_bn", 5, pretrained, **{"layers": (2, 2, 4, 4, 4), **kwargs})


@register_model
def cifar_wrn20_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-20-8 for 32x32 images, 17.2 M parameters. The name is SCAN's, in which projections are no layers; it is
    WRN-22-8 in the paper of Wide ResNets."""
    return _create(CifarWideResNet, "cifar_wrn20_8", 3, pretrained, **{"depth": 3, "widen_factor": 8, **kwargs})


@register_model
def cifar_wrn28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-10 for 32x32 images, 36.5 M parameters."""
    return _create(CifarWideResNet, "cifar_wrn28_10", 3, pretrained, **{"depth": 4, "widen_factor": 10, **kwargs})


@register_model
def cifar_wrn44_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-44-8 for 32x32 images, 42.0 M parameters. The name is SCAN's, in which projections are no layers; in
    the paper of Wide ResNets it would be WRN-46-8."""
    return _create(CifarWideResNet, "cifar_wrn44_8", 3, pretrained, **{"depth": 7, "widen_factor": 8, **kwargs})
