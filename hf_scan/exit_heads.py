# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What stands at an exit point: an attention module and a shallow classifier, in the paper's form or a cheap one."""

import math

import torch
from torch import nn


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    """A convolution without bias and its batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def separable_conv_norm(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """A depthwise 3x3 and a pointwise convolution with one batch norm behind them."""
    depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
    return [depthwise, *conv_norm(in_channels, out_channels)]


class ConvAttention(nn.Module):
    """
    The paper's attention module: a mask from a stride-2 convolution and a transposed one, multiplied with the feature.

    Source: the SCAN authors' published code.

    Args:
        channels (`int`): Channels of the feature, `(batch_size, channels, height, width)` in and out.
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
        height, width = feature.shape[-2:]
        # On a map of odd size the mask comes out one pixel larger.
        return feature * self.mask(feature)[..., :height, :width]


class SeparableAttention(nn.Module):
    """
    The same mask from two separable convolutions at half the resolution, enlarged bilinearly.

    Args:
        channels (`int`): Channels of the feature, `(batch_size, channels, height, width)` in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            *separable_conv_norm(channels, channels, stride=2),
            nn.ReLU(inplace=True),
            *separable_conv_norm(channels, channels, stride=1),
        )

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        # The sigmoid before the enlargement, where there is a quarter of the numbers.
        mask = self.mask(feature).sigmoid()
        return feature * nn.functional.interpolate(mask, size=feature.shape[-2:], mode="bilinear")


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
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fc = nn.Linear(feature_size, num_labels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pooled feature `(batch_size, feature_size)` and the logits `(batch_size, num_labels)`."""
        pooled = self.features(feature)
        return pooled, self.fc(pooled)


class SeparableClassifier(nn.Module):
    """
    A chain of separable stride-2 convolutions, each doubling the channels, down to the deepest feature's map. The
    widening to the deepest feature's width comes after the pooling, where it costs one multiplication a weight.

    Args:
        channels, stride, feature_size, num_labels: as for [`ConvClassifier`].
    """

    def __init__(self, channels: int, stride: int, feature_size: int, num_labels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(max(1, round(math.log2(stride)))):
            wider = max(channels, min(2 * channels, feature_size))
            layers += [*separable_conv_norm(channels, wider, stride=2 if stride > 1 else 1), nn.ReLU(inplace=True)]
            channels = wider
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if channels != feature_size:
            layers += [nn.Linear(channels, feature_size), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(feature_size, num_labels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pooled feature `(batch_size, feature_size)` and the logits `(batch_size, num_labels)`."""
        pooled = self.features(feature)
        return pooled, self.fc(pooled)


ATTENTION_TYPES: dict[str, type[nn.Module]] = {
    "conv": ConvAttention,
    "separable": SeparableAttention,
    "none": nn.Identity,
}
CLASSIFIER_TYPES: dict[str, type[ConvClassifier] | type[SeparableClassifier]] = {
    "conv": ConvClassifier,
    "separable": SeparableClassifier,
}


class ExitHead(nn.Module):
    """
    One early exit. It only reads the stage's feature: the next stage gets it as it was.

    Args:
        channels (`int`): Channels of the stage's feature.
        stride (`int`): How many times finer its map is than the deepest one.
        feature_size (`int`): Width of the deepest feature.
        num_labels (`int`): Labels.
        attention_type, classifier_type, head_width: as in [`ScanConfig`].
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        feature_size: int,
        num_labels: int,
        attention_type: str = "separable",
        classifier_type: str = "separable",
        head_width: int = 64,
    ) -> None:
        super().__init__()
        self.squeeze: nn.Module = nn.Identity()
        # Everything behind the bottleneck costs the bottleneck's width, however wide the backbone is.
        if classifier_type == "separable" and channels > head_width:
            self.squeeze = nn.Sequential(*conv_norm(channels, head_width), nn.ReLU(inplace=True))
            channels = head_width
        self.attention = ATTENTION_TYPES[attention_type](channels)
        self.classifier = CLASSIFIER_TYPES[classifier_type](channels, stride, feature_size, num_labels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            feature (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The stage's feature.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the pooled feature `(batch_size, feature_size)` for the hint loss,
            and the logits `(batch_size, num_labels)`.
        """
        return self.classifier(self.attention(self.squeeze(feature)))
