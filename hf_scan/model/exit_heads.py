# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Exit heads: an attention module and a shallow classifier, in the paper's form or in cheaper ones."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    """Return a convolution without bias and its batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def separable_conv_norm(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """Return a depthwise 3x3 and a pointwise convolution, followed by one batch norm."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
    return [depthwise, *conv_norm(in_channels, out_channels)]


class MapMean(nn.Module):
    """The mean of a map, as `AdaptiveAvgPool2d(1)`, in one kernel: a third of its time at batch size 1."""

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        if any(isinstance(size, torch.SymInt) for size in feature.shape[-2:]):
            return feature.mean((-2, -1), keepdim=True)  # `torch.export` cannot solve for the pooling's output size
        return nn.functional.avg_pool2d(feature, feature.shape[-2:])


class ConvAttention(nn.Module):
    """
    The paper's attention module: a mask from a stride-2 convolution and a transposed one.

    Source: the SCAN authors' published code.

    Args:
        channels (`int`): Channels of the feature `(batch_size, channels, height, width)`, and of the mask, which is as
            large and lies between 0 and 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            *conv_norm(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return self.fit(self.mask(feature), feature)

    @staticmethod
    def fit(mask: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Return the mask at the feature's height and width. On a map of odd size it is computed one pixel larger."""
        height, width = feature.shape[-2:]
        return mask[..., :height, :width]


class SeparableAttention(nn.Module):
    """
    The same mask from two separable convolutions at half the resolution, enlarged bilinearly.

    Args:
        channels (`int`): As for [`ConvAttention`].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            *separable_conv_norm(channels, channels, stride=2),
            nn.ReLU(inplace=True),
            *separable_conv_norm(channels, channels, stride=1),
        )

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return self.fit(self.mask(feature), feature)

    @staticmethod
    def fit(mask: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Return the mask at the feature's height and width. The sigmoid runs first, on a quarter of the values."""
        return nn.functional.interpolate(mask.sigmoid(), size=feature.shape[-2:], mode="bilinear")


class NearestAttention(SeparableAttention):
    """
    [`SeparableAttention`] enlarged by repeating values. ONNX Runtime does that in the layout of its convolutions,
    which a bilinear enlargement makes it leave and come back to.

    Args:
        channels (`int`): As for [`ConvAttention`].
    """

    @staticmethod
    def fit(mask: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Return the mask at the feature's height and width, which are twice its own or one less."""
        height, width = feature.shape[-2:]
        # Not enlarged to a size, which has the same values: ONNX Runtime cannot load that within nested branches.
        return nn.functional.interpolate(mask.sigmoid(), scale_factor=2.0)[..., :height, :width]


class ConvClassifier(nn.Module):
    """
    The paper's shallow classifier: one large strided convolution at 128 channels, widened to the deepest feature.

    Source: the SCAN authors' published code.

    Args:
        channels (`int`): Channels of the feature `(batch_size, channels, height, width)` that comes in.
        stride (`int`): How many times finer its map is than the deepest one.
        feature_size (`int`): Width of the deepest feature, and so of this classifier's.
        num_labels (`int`): Labels.
    """

    def __init__(self, channels: int, stride: int, feature_size: int, num_labels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_norm(channels, 128),
            nn.ReLU(inplace=True),
            *conv_norm(128, 128, stride, stride=stride),
            nn.ReLU(inplace=True),
            *conv_norm(128, feature_size),
            nn.ReLU(inplace=True),
            MapMean(),
            nn.Flatten(),
        )
        self.fc = nn.Linear(feature_size, num_labels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pooled feature `(batch_size, feature_size)` and the logits `(batch_size, num_labels)`."""
        pooled = self.features(feature)
        return pooled, self.fc(pooled)


class SeparableClassifier(nn.Module):
    """
    A chain of separable stride-2 convolutions, each doubling the channels, down to the deepest feature's map. The
    last widening comes after the pooling, where it costs one multiplication a weight.

    Args:
        channels, stride, feature_size, num_labels: as for [`ConvClassifier`].
        depth (`int`, *optional*, defaults to 1): Separable convolutions at least. Those that the way down to the
            deepest map does not need come first and keep map and channels.
    """

    def __init__(self, channels: int, stride: int, feature_size: int, num_labels: int, depth: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth - max(1, round(math.log2(stride)))):
            layers += [*separable_conv_norm(channels, channels, stride=1), nn.ReLU(inplace=True)]
        for _ in range(max(1, round(math.log2(stride)))):
            wider = max(channels, min(2 * channels, feature_size))
            layers += [*separable_conv_norm(channels, wider, stride=2 if stride > 1 else 1), nn.ReLU(inplace=True)]
            channels = wider
        layers += [MapMean(), nn.Flatten()]
        if channels != feature_size:
            layers += [nn.Linear(channels, feature_size), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(feature_size, num_labels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pooled feature `(batch_size, feature_size)` and the logits `(batch_size, num_labels)`."""
        pooled = self.features(feature)
        return pooled, self.fc(pooled)


ATTENTION_TYPES: dict[str, type[ConvAttention] | type[SeparableAttention]] = {
    "conv": ConvAttention,
    "separable": SeparableAttention,
    "nearest": NearestAttention,
}
CLASSIFIER_TYPES: dict[str, Callable[..., ConvClassifier | SeparableClassifier]] = {
    "conv": ConvClassifier,
    "separable": SeparableClassifier,
    "chain": partial(SeparableClassifier, depth=2),
}
NARROWEST_HEAD = 64


# Of the backbone's MACs, for all early exits together.
HEAD_BUDGET = 0.1
HEAD_WIDTHS = (16, 32, 64, 128, 256)
# On a deepest feature of thousands of channels, the last layers of a cheap exit would cost more than all before them:
# in parameters, and at batch size 1 in time. They also learn from a few thousand images less well.
HEAD_FEATURE_SIZE = 256


def head_widths(
    config: Any, channels: Sequence[int], strides: Sequence[int], feature_size: int, backbone_macs: float
) -> list[int]:
    """
    Return the width of each early exit's head: `config.head_width` where it is given, and 64 for `"separable"` heads.
    A `"chain"` is as wide as it can be for its part of a tenth of the backbone's MACs, which the exits share equally,
    and at most half as wide as the deepest feature, or 64.

    Args:
        config ([`ScanConfig`]): Its `head_width` and `classifier_type` are read.
        channels (`Sequence[int]`): Channels of each stage with an early exit.
        strides (`Sequence[int]`): How many times finer its map is than the deepest one.
        feature_size (`int`): Width of the deepest feature.
        backbone_macs (`float`): MACs of the backbone for one pixel of the deepest map.

    Raises:
        `ValueError`: if `head_width` is a list of another length.
    """
    given = config.head_width
    if given is None and config.classifier_type == "chain":
        counted_size = min(feature_size, 2 * HEAD_WIDTHS[-1])  # what features of less save is left to the last layers
        budget = HEAD_BUDGET * backbone_macs / max(1, len(channels))
        widest = max(NARROWEST_HEAD, counted_size // 2)
        found = []
        for number, stride in zip(channels, strides):
            fitting = [
                width
                for width in HEAD_WIDTHS
                if width <= widest and _chain_macs(number, stride, width, counted_size) <= budget
            ]
            found.append(max(fitting, default=HEAD_WIDTHS[0]))
        return found
    if not isinstance(given, list):
        return [given or NARROWEST_HEAD] * len(channels)
    if len(set(given)) == 1:  # a checkpoint's, which may be loaded with other exit points
        return given[:1] * len(channels)
    if len(given) != len(channels):
        raise ValueError(
            f"`head_width` is {given}, {len(given)} numbers; the network has {len(channels)} early exits. Give one "
            "number for all of them, or one each."
        )
    return given


def _chain_macs(channels: int, stride: int, width: int, feature_size: int) -> float:
    """Return the MACs of a `"chain"` head with attention, for one pixel of the deepest map."""
    finer = stride // _patch_size(stride, "chain")  # than the deepest map, behind the squeeze
    pixels = finer**2
    macs = channels * stride**2 + pixels * channels * width + 2 * pixels / 4 * width * (width + 9)
    halvings = max(1, round(math.log2(finer)))
    macs += max(0, 2 - halvings) * pixels * width * (width + 9)
    for _ in range(halvings):
        wider = max(width, min(2 * width, feature_size))
        pixels = max(1, pixels // 4)
        macs += pixels * width * (wider + 9)
        width = wider
    return macs


def _patch_size(stride: int, classifier_type: str) -> int:
    """Return the height and width of the patches by which a head reduces a fine map first."""
    return max(min(stride, 2), stride // (4 if classifier_type == "chain" else 2))


class ExitHead(nn.Module):
    """
    The head of one early exit: attention and shallow classifier. It only reads the stage's feature, which the next
    stage gets unchanged.

    Args:
        channels (`int`): Channels of the stage's feature.
        stride (`int`): How many times finer its map is than the deepest one.
        feature_size (`int`): Width of the deepest feature.
        num_labels (`int`): Labels.
        attention_type, classifier_type, head_width, head_feature_size: as in [`ScanConfig`].
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        feature_size: int,
        num_labels: int,
        attention_type: str = "nearest",
        classifier_type: str = "separable",
        head_width: int = NARROWEST_HEAD,
        head_feature_size: int = HEAD_FEATURE_SIZE,
    ) -> None:
        super().__init__()
        own_size = feature_size
        self.squeeze = nn.Sequential()
        if classifier_type != "conv":
            # A head is expensive on fine or wide maps, so all of it works at one width and on a map at most twice (a
            # chain: four times) as fine as the deepest one. The paper's classifier, too, reduces a fine map by one
            # large stride.
            own_size = min(feature_size, head_feature_size)
            patch = _patch_size(stride, classifier_type)
            if patch > 1:
                self.squeeze.append(nn.Conv2d(channels, channels, patch, patch, groups=channels, bias=False))
            self.squeeze.extend([*conv_norm(channels, head_width), nn.ReLU(inplace=True)])
            channels, stride = head_width, stride // patch
        self.attention = None if attention_type == "none" else ATTENTION_TYPES[attention_type](channels)
        self.classifier = CLASSIFIER_TYPES[classifier_type](channels, stride, own_size, num_labels)
        self.hint_projection = nn.Identity() if own_size == feature_size else nn.Linear(own_size, feature_size)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Return the exit's feature, its logits and its attention mask.

        Args:
            feature (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The stage's feature.

        Returns:
            `tuple`: the exit's own feature, which its last layer reads and `hint_projection` brings to the deepest
            feature's width; the logits `(batch_size, num_labels)`; and the attention mask, if there is one.
        """
        feature = self.squeeze(feature)
        mask = None if self.attention is None else self.attention(feature)
        if mask is not None:
            feature = feature * mask  # under the same name, so that what it was before takes no more memory
        pooled, logits = self.classifier(feature)
        return pooled, logits, mask
