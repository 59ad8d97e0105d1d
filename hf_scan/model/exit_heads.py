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


class MapMean(nn.Module):
    """`AdaptiveAvgPool2d(1)` in one kernel: a third of its time at batch size 1."""

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
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
        """The mask as large as the feature: on a map of odd size it comes out one pixel larger."""
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
        """The mask as large as the feature. The sigmoid comes first, while there is a quarter of the numbers."""
        return nn.functional.interpolate(mask.sigmoid(), size=feature.shape[-2:], mode="bilinear")


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
        """Returns the pooled feature `(batch_size, feature_size)` and the logits `(batch_size, num_labels)`."""
        pooled = self.features(feature)
        return pooled, self.fc(pooled)


class SeparableClassifier(nn.Module):
    """
    A chain of separable stride-2 convolutions, each doubling the channels, down to the deepest feature's map. The
    last widening comes after the pooling, where it costs one multiplication a weight.

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
        layers += [MapMean(), nn.Flatten()]
        if channels != feature_size:
            layers += [nn.Linear(channels, feature_size), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(feature_size, num_labels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the pooled feature `(batch_size, feature_size)` and the logits `(batch_size, num_labels)`."""
        pooled = self.features(feature)
        return pooled, self.fc(pooled)


ATTENTION_TYPES: dict[str, type[ConvAttention] | type[SeparableAttention]] = {
    "conv": ConvAttention,
    "separable": SeparableAttention,
}
CLASSIFIER_TYPES: dict[str, type[ConvClassifier] | type[SeparableClassifier]] = {
    "conv": ConvClassifier,
    "separable": SeparableClassifier,
}


# On a deepest feature of thousands of channels, the last layer of a cheap exit would cost more than all before it: in
# parameters, and at batch size 1 in time.
MAX_SEPARABLE_FEATURE_SIZE = 512


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
        own_size = feature_size
        self.squeeze = nn.Sequential()
        if classifier_type == "separable":
            # A head is dear where maps are fine or wide, so all of it works at one width and on a map at most twice as
            # fine as the deepest one. The paper's classifier, too, takes a fine map in by one large stride.
            patch = max(min(stride, 2), stride // 2)
            if patch > 1:
                self.squeeze.append(nn.Conv2d(channels, channels, patch, patch, groups=channels, bias=False))
            self.squeeze.extend([*conv_norm(channels, head_width), nn.ReLU(inplace=True)])
            channels, stride = head_width, stride // patch
            own_size = min(feature_size, MAX_SEPARABLE_FEATURE_SIZE)
        self.attention = None if attention_type == "none" else ATTENTION_TYPES[attention_type](channels)
        self.classifier = CLASSIFIER_TYPES[classifier_type](channels, stride, own_size, num_labels)
        self.hint_projection = nn.Identity() if own_size == feature_size else nn.Linear(own_size, feature_size)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
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
