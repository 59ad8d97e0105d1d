# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Image classifiers of Transformers as backbones, written as timm's are: features, then a head that gives logits."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.activations import ACT2FN


class TransformersBackbone(nn.Module):
    """
    A classifier of Transformers that takes images and returns logits alone. Its modules are the classifier's own,
    under their names there, so that weights have the same names too.

    Args:
        model ([`~transformers.PreTrainedModel`]): The classifier, whose modules are taken over.
    """

    body_name = ""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.add_module(self.body_name, getattr(model, self.body_name))
        self.classifier = model.classifier
        size = getattr(model.config, "image_size", None)
        size = 224 if size is None else size if isinstance(size, int) else size[0]
        self.pretrained_cfg = {"input_size": (model.config.num_channels, size, size)}
        self.feature_info = self.make_feature_info()
        self.num_features = self.feature_info[-1]["num_chs"]

    @property
    def body(self) -> Any:
        """The classifier's own model, without its last layer."""
        return getattr(self, self.body_name)

    def make_feature_info(self) -> list[dict[str, Any]]:
        """Return the taps, as timm's `feature_info` holds them."""
        raise NotImplementedError

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the last map."""
        raise NotImplementedError

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits from the last map, or what the last layer reads."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        layer: nn.Module = self.classifier[-1] if isinstance(self.classifier, nn.Sequential) else self.classifier
        return layer


class _Pyramid(TransformersBackbone):
    """Stages in a list, each of which halves the map."""

    def pyramid(self, first: int) -> list[dict[str, Any]]:
        stages = range(len(self.body.encoder.stages))
        return [
            {
                "module": f"{self.body_name}.encoder.stages.{index}",
                "num_chs": self.config.hidden_sizes[index],
                "reduction": first * 2**index,
            }
            for index in stages
        ]


class ResNetBackbone(_Pyramid):
    """[`~transformers.ResNetForImageClassification`]."""

    body_name = "resnet"

    def make_feature_info(self) -> list[dict[str, Any]]:
        return self.pyramid(8 if self.config.downsample_in_first_stage else 4)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        feature: torch.Tensor = self.body.embedder(images)
        for stage in self.body.encoder.stages:
            feature = stage(feature)
        return feature

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = self.body.pooler(feature)
        logits: torch.Tensor = pooled.flatten(1) if pre_logits else self.classifier(pooled)
        return logits


class ConvNextBackbone(_Pyramid):
    """[`~transformers.ConvNextForImageClassification`]."""

    body_name = "convnext"

    def make_feature_info(self) -> list[dict[str, Any]]:
        return self.pyramid(_side(self.config.patch_size))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        feature: torch.Tensor = self.body.embeddings(images)
        for stage in self.body.encoder.stages:
            feature = stage(feature)
        return feature

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = self.body.layernorm(feature.mean([-2, -1]))
        logits: torch.Tensor = pooled if pre_logits else self.classifier(pooled)
        return logits


class ViTBackbone(TransformersBackbone):
    """[`~transformers.ViTForImageClassification`]."""

    body_name = "vit"
    num_prefix_tokens = 1

    def make_feature_info(self) -> list[dict[str, Any]]:
        name, layers = self.layers()
        reduction = _side(self.config.patch_size)
        return [
            {"module": f"vit.{name}.{index}", "num_chs": self.config.hidden_size, "reduction": reduction}
            for index in range(len(layers))
        ]

    def layers(self) -> tuple[str, nn.ModuleList]:
        """Return the list of layers and its name, which differs between versions of Transformers."""
        name = "layers" if hasattr(self.body, "layers") else "encoder.layer"
        found: Any = self.body.get_submodule(name)
        return name, found

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.body.embeddings(images)
        for layer in self.layers()[1]:
            tokens = layer(tokens)
        normed: torch.Tensor = self.body.layernorm(tokens)
        return normed

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = feature[:, 0, :]
        logits: torch.Tensor = pooled if pre_logits else self.classifier(pooled)
        return logits


def _side(patch_size: Any) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) != 1:
        raise ValueError(f"`patch_size` is {patch_size}; expected patches that are squares.")
    return int(sides.pop())


@dataclass(frozen=True)
class Family:
    """A family of classifiers: its configuration, the classifier and the backbone that is made of it."""

    config: type[Any]
    classifier: type[Any]
    backbone: type[TransformersBackbone]

    @property
    def arguments(self) -> set[str]:
        """The fields of its configuration that say what the network is, and no other field of a `ScanConfig` does."""
        inherited = {field.name for field in fields(PreTrainedConfig)} | {"num_channels", "image_size"}
        own = {field.name for field in fields(self.config) if field.init and not field.name.startswith("_")}
        return own - inherited


# Nothing else is built from a configuration.
FAMILIES = {
    "convnext": Family(ConvNextConfig, ConvNextForImageClassification, ConvNextBackbone),
    "resnet": Family(ResNetConfig, ResNetForImageClassification, ResNetBackbone),
    "vit": Family(ViTConfig, ViTForImageClassification, ViTBackbone),
}


def check_family(name: str, arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` unless a configuration names a known family and arguments that it has."""
    if name not in FAMILIES:
        raise ValueError(
            f"`backbone` is {name[:100]!r}, which is no family of Transformers' classifiers that is known here; "
            f"expected one of {sorted(FAMILIES)}."
        )
    known = FAMILIES[name].arguments
    if unknown := sorted(str(argument)[:100] for argument in set(arguments) - known):
        raise ValueError(f"`backbone_kwargs` names {unknown[:5]}; expected some of {sorted(known)}.")
    for argument, value in arguments.items():
        if argument.endswith("_act") and not (isinstance(value, str) and value in ACT2FN):
            raise ValueError(f"`backbone_kwargs` gives {argument!r} as {str(value)[:100]!r}; expected an activation.")


def create_family(name: str, arguments: dict[str, Any], **given: Any) -> TransformersBackbone:
    """
    Create a classifier of Transformers as a backbone, with new weights.

    Args:
        name (`str`): One of [`FAMILIES`].
        arguments (`dict[str, Any]`): Arguments of its configuration.
        given: More of them, such as `num_labels`; those that it does not have are left out.
    """
    family = FAMILIES[name]
    known = {field.name for field in fields(family.config)} | {"num_labels"}
    config = family.config(**arguments, **{key: value for key, value in given.items() if key in known})
    return family.backbone(family.classifier(config))


def arguments_of(config: Any) -> dict[str, Any]:
    """Return what a configuration of a known family says of the network that is not the default."""
    family = FAMILIES[config.model_type]
    default = family.config()
    values = {name: getattr(config, name) for name in family.arguments}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    defaults = {name: getattr(default, name) for name in values}
    return {
        name: value
        for name, value in sorted(values.items())
        if value != (list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name])
    }


__all__ = ["FAMILIES", "TransformersBackbone", "arguments_of", "check_family", "create_family"]
