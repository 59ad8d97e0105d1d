# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Equip a timm model with early exits: [`TimmConversionMixin`]."""

from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import is_model_pretrained, load_model_config_from_hf
from torch import nn
from transformers import PreTrainedModel

from .backbone import create_timm_model, size_argument, timm_preprocessing
from .configuration_scan import ScanConfig
from .evaluation_mode import evaluating
from .provenance import unknown_images


class TimmConversionMixin(PreTrainedModel):
    """A mixin that adds `from_timm` to [`ScanForImageClassification`]."""

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        num_labels: int | None = None,
        exit_points: list[int | str] | None = None,
        trained_on: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Equip a model of timm with early exits. Weights, label names and preprocessing are kept, and the deepest exit
        answers as the model did. The early exits have to be trained.

        Args:
            model (`str` or `torch.nn.Module`): Name of a model as `timm.create_model` takes it, `hf-hub:` and
                `local-dir:` included, or a model that it made, which is copied, also out of a `torch.compile`,
                `DataParallel` or `TimmWrapperForImageClassification` around it. Weights on the Hub that are of a
                ResNet for 32x32 images, though they name timm's for larger ones, are recognised.
            pretrained (`bool`, *optional*, defaults to `False`): Whether timm loads weights for a name.
            num_labels (`int`, *optional*): Labels. Defaults to the model's own. With another number, its classifier
                starts anew.
            exit_points (`list[int | str]`, *optional*): As in [`ScanConfig`].
            trained_on (`str`, *optional*): The images that the weights were trained on, as
                [`~hf_scan.data.some_digests`] of the split. Unless they are given, `exit_config.trained_on` says that
                those of a trained backbone cannot be known.
            kwargs: Further arguments of [`ScanConfig`]. A model that was not made with timm's defaults needs those
                that it was made with: `backbone_kwargs`, `num_channels`, `image_size`.

        Returns:
            [`ScanForImageClassification`]: in training mode.

        Raises:
            `ValueError`: if timm does not know the model, the arguments do not give what the model is, or it cannot be
                cut into stages.

        Example:

        ```python
        >>> import timm
        >>> from hf_scan import ScanForImageClassification

        >>> model = ScanForImageClassification.from_timm(timm.create_model("resnet18"), exit_points=["layer2"])
        >>> model.num_exits, model.config.id2label[0]
        (2, 'tench, Tinca tinca')
        ```
        """
        source = _create_source(model, pretrained, num_labels, kwargs) if isinstance(model, str) else unwrapped(model)
        _check_source(model, source, pretrained)
        cfg = source.pretrained_cfg
        own_labels = num_labels is None or num_labels == source.num_classes
        if "id2label" not in kwargs:
            names = label_names(cfg, source.num_classes) if own_labels else None
            if names is not None:
                kwargs["id2label"] = dict(enumerate(names))
                kwargs["label2id"] = {name: index for index, name in enumerate(names)}
            else:
                kwargs["num_labels"] = num_labels or source.num_classes
        tagged = f"{cfg['architecture']}.{cfg.get('tag')}"
        config = ScanConfig(
            backbone=tagged if is_model_pretrained(tagged) else cfg["architecture"],
            exit_points=exit_points,
            **{"preprocessing": timm_preprocessing(cfg), **kwargs},
        )
        example = next(source.parameters())
        scan = cls(config).to(device=example.device, dtype=example.dtype)
        _load_source(scan, source, own_labels)
        if trained_on is not None or pretrained or not isinstance(model, str):
            trained_on = trained_on or unknown_images(f"weights of {config.backbone}")
            scan.exit_config = scan.exit_config.replace(trained_on=trained_on)
        return scan


def _create_source(name: str, pretrained: bool, num_labels: int | None, settings: dict[str, Any]) -> Any:
    """Create the model of a name with the arguments of a [`ScanConfig`], which are those of timm under other names."""
    given = {"num_classes": num_labels, "in_chans": settings.get("num_channels")}
    given = {key: value for key, value in given.items() if value is not None}
    given |= settings.get("backbone_kwargs") or {}
    given = {**size_argument(name, settings.get("image_size")), **given}
    try:
        return create_timm_model(name, pretrained, **given)
    except ValueError:
        source = _create_for_small_images(name, **given) if pretrained else None
        if source is None:
            raise
        return source


def _check_source(model: Any, source: Any, pretrained: bool) -> None:
    """Check that a model, which was given or created for its name, is a classifier of timm."""
    if pretrained and not isinstance(model, str):
        raise ValueError("`pretrained` is for a model that is given by name; this one is given with weights.")
    if not hasattr(source, "forward_head") and hasattr(source, "feature_info"):
        raise ValueError(
            f"`model` is a {type(source).__name__}, which returns features and has no classifier; expected one "
            "that `timm.create_model` made without `features_only=True`."
        )
    cfg = getattr(source, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or "architecture" not in cfg:
        raise ValueError(
            f"`model` is a {type(source).__name__} without timm's `pretrained_cfg`; expected a model that "
            "`timm.create_model` made, or the name of one."
        )


def _load_source(scan: PreTrainedModel, source: nn.Module, own_labels: bool) -> None:
    """
    Copy the weights of a model of timm into the backbone.

    Args:
        scan ([`ScanForImageClassification`]): The network.
        source (`torch.nn.Module`): The model of timm.
        own_labels (`bool`): Whether the network has the model's labels. Otherwise its classifier starts anew.

    Raises:
        `ValueError`: if the backbone is another model.
    """
    config, weights = scan.config, source.state_dict()
    if not own_labels:
        names: Any = source.pretrained_cfg["classifier"]  # type: ignore[index]
        classifiers = names if isinstance(names, (tuple, list)) else [names]
        weights |= {
            name: value
            for name, value in scan.backbone.state_dict().items()
            if name.startswith(tuple(f"{classifier}." for classifier in classifiers))
        }
    try:
        scan.backbone.load_state_dict(weights)
        if own_labels and not _answer_alike(scan.backbone, source, config):
            raise RuntimeError("the weights fit, and the answers differ")
    except RuntimeError as error:
        raise ValueError(
            f"The model is not what timm makes of {config.backbone!r} with {config.backbone_kwargs}, "
            f"{config.num_channels} channels and images of {config.image_size} pixels: {error}. Give the "
            "`backbone_kwargs`, `num_channels` and `image_size` that it was made with."
        ) from error


def unwrapped(model: Any) -> Any:
    """Return the model of timm in what PyTorch and Transformers wrap around it."""
    for name in ("_orig_mod", "module", "timm_model"):  # compiled; parallel; of Transformers
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return unwrapped(inner)
    return model


def _create_for_small_images(name: str, **kwargs: Any) -> Any:
    """
    Create the network for 32x32 images whose weights are on the Hub under the name of timm's network for larger ones.
    (Their authors replaced the stem of a timm ResNet.)
    """
    if not name.startswith("hf-hub:"):
        return None
    cfg, architecture, arguments = load_model_config_from_hf(name.removeprefix("hf-hub:"))[:3]
    small = f"cifar_{architecture}"
    if not timm.is_model(small):
        return None
    settings = {"num_classes": cfg["num_classes"], **(arguments or {}), **kwargs}
    source = create_timm_model(small, pretrained=True, pretrained_cfg=cfg, **settings)
    source.pretrained_cfg = {**source.pretrained_cfg, "architecture": small, "tag": None}
    return source


@torch.no_grad()
def _answer_alike(one: nn.Module, other: nn.Module, config: ScanConfig) -> bool:
    assert config.image_size is not None  # the network filled it in
    example = next(one.parameters())
    images = example.new_ones(1, config.num_channels, config.image_size, config.image_size)

    def answer(model: nn.Module) -> torch.Tensor:
        with evaluating(model):
            logits: torch.Tensor = model(images)
        return logits

    return torch.allclose(answer(one), answer(other), rtol=1e-3, atol=1e-3)


def label_names(pretrained_cfg: dict[str, Any], num_labels: int) -> list[str] | None:
    """Return the names that timm has for the classes of a checkpoint, if it has any."""
    names = pretrained_cfg.get("label_names")
    if names is None and (subset := infer_imagenet_subset({"num_classes": num_labels})):
        info = ImageNetInfo(subset)
        names = [info.label_name_to_description(synset) for synset in info.label_names()]
    return list(names) if names is not None and len(names) == num_labels else None


__all__ = ["TimmConversionMixin", "label_names", "unwrapped"]
