# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Equip any trained classifier with early exits: [`ModuleConversionMixin`]."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import create_backbone, fill_in
from .configuration_scan import ScanConfig
from .evaluation_mode import evaluating
from .provenance import unknown_images
from .stages import cut_network
from .timm_conversion import label_names, unwrapped
from .torchvision_backbones import find_torchvision
from .transformers_backbones import FAMILIES, TransformersBackbone, arguments_of


logger = logging.get_logger(__name__)


class ModuleConversionMixin(PreTrainedModel):
    """A mixin that adds `from_module` to [`ScanForImageClassification`]."""

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        image_size: int | None = None,
        num_labels: int | None = None,
        preprocessing: Any = None,
        exit_points: list[int | str] | None = None,
        trained_on: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Equip a trained classifier with early exits: one of torchvision, `ResNetForImageClassification`,
        `ConvNextForImageClassification` or `ViTForImageClassification` of Transformers, one of timm, or any module
        that takes images, returns logits and that `torch.fx` can write down, such as an `nn.Sequential`. It is copied.
        The deepest exit answers as the module did, to the bit; the early exits have to be trained.

        What is recognised as one of a library's is saved by its name there and loaded like any other. A module of your
        own is trained, calibrated and exported to ONNX; it cannot be saved with `save_pretrained`, since a checkpoint
        holds no code. `include_code=True` copies the files of `hf_scan.model`, which import torch, timm and
        Transformers only; what a module of your own imports besides cannot be told from it, so that a checkpoint with
        its code would fail wherever a file is missing. Register it with timm to save it by a name.

        Args:
            module (`torch.nn.Module`): The classifier, also in a `torch.compile` or `DataParallel` around it.
            image_size (`int`, *optional*): Height and width of its images in pixels. Defaults to what it says itself.
            num_labels (`int`, *optional*): Labels. Defaults to as many as it answers with.
            preprocessing (`dict[str, Any]`, *optional*): How its images are prepared, as in [`ScanConfig`], or an
                image processor of Transformers, or the `transforms()` of torchvision's weights. Defaults to
                ImageNet's mean and standard deviation and a crop of 0.875, with a warning.
            exit_points (`list[int | str]`, *optional*): As in [`ScanConfig`]. Defaults to the last block at each size
                of maps, or to a quarter, half and three quarters of the depth where all maps are of one size.
            trained_on (`str`, *optional*): As for [`~ScanForImageClassification.from_timm`].
            kwargs: Further arguments of [`ScanConfig`], such as `id2label`. A module of torchvision that was not made
                with its builder's defaults needs `backbone` and `backbone_kwargs` to be saved.

        Returns:
            [`ScanForImageClassification`]: in training mode.

        Raises:
            `ValueError`: if the module cannot be written down, has several outputs, no classifier or other labels.

        Example:

        ```python
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from hf_scan import ScanForImageClassification

        >>> plain = resnet18(num_classes=10).eval()
        >>> prepared = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        >>> model = ScanForImageClassification.from_module(plain, image_size=64, preprocessing=prepared).eval()
        >>> model.config.backbone_source, model.config.backbone, model.config.exit_points
        ('torchvision', 'resnet18', ['layer1', 'layer2', 'layer3'])
        >>> images = torch.rand(2, 3, 64, 64)
        >>> torch.equal(model(images).logits, plain(images))
        True
        ```
        """
        source = unwrapped(module)
        if not isinstance(source, nn.Module):
            raise ValueError(f"`module` is a {type(source).__name__}; expected a `torch.nn.Module`.")
        if isinstance(getattr(source, "pretrained_cfg", None), dict) and not isinstance(source, TransformersBackbone):
            given = {"image_size": image_size, "preprocessing": preprocessing}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            converted: Any = cls.from_timm(
                source, num_labels=num_labels, exit_points=exit_points, trained_on=trained_on, **kwargs
            )
            return converted
        settings = {**kwargs, "exit_points": exit_points}
        if image_size is not None:
            settings["image_size"] = image_size
        if preprocessing is None:
            logger.warning(
                "`preprocessing` is not given: images are taken to be prepared with ImageNet's mean and standard "
                "deviation. Give what the module was trained with."
            )
        else:
            settings["preprocessing"] = _as_preprocessing(preprocessing)
        backbone, settings = _as_backbone(source, settings)
        settings = _with_labels(backbone, settings, num_labels)
        config = _describe(backbone, settings)
        example = next(backbone.parameters(), torch.empty(()))
        scan = cls(config, backbone).to(device=example.device, dtype=example.dtype)
        scan.exit_config = scan.exit_config.replace(
            trained_on=trained_on or unknown_images(f"weights of {config.backbone}")
        )
        return scan


def _as_backbone(source: nn.Module, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a module that returns logits alone, with what its own configuration says."""
    if not isinstance(source, PreTrainedModel):
        return copy.deepcopy(source), settings
    family = next((one for one in FAMILIES.values() if type(source) is one.classifier), None)
    if family is None:
        known = sorted(one.classifier.__name__ for one in FAMILIES.values())
        raise ValueError(
            f"`module` is a {type(source).__name__} of Transformers; expected one of {known}, or a module that "
            "returns logits alone."
        )
    config: Any = source.config
    size = getattr(config, "image_size", None)
    own: dict[str, Any] = {
        "num_channels": config.num_channels,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
    }
    if size is not None and config.model_type == "vit":  # others take images of any size
        own["image_size"] = size if isinstance(size, int) else size[0]
    return family.backbone(copy.deepcopy(source)), {**own, **settings}


def _with_labels(backbone: nn.Module, settings: dict[str, Any], num_labels: int | None) -> dict[str, Any]:
    """Return the settings with the number of labels that the module answers with."""
    channels = settings.setdefault("num_channels", _channels(backbone))
    size = settings.get("image_size") or getattr(backbone, "image_size", None)
    if isinstance(backbone, TransformersBackbone):
        found = int(backbone.get_classifier().out_features)  # type: ignore[arg-type]
    elif not isinstance(size, int):
        raise ValueError(
            f"{type(backbone).__name__} does not say which images it was made for; expected `image_size` in pixels, "
            "such as 224."
        )
    else:
        stages, head = cut_network(backbone, settings["exit_points"], (channels, size, size))
        assert head.num_labels is not None  # it has been looked at
        found, settings["exit_points"] = head.num_labels, [stage.name for stage in stages[:-1]]
    if num_labels not in (None, found):
        raise ValueError(
            f"`num_labels` is {num_labels}, and {type(backbone).__name__} answers with {found}. Leave it out, or "
            "replace the module's last layer first."
        )
    if "id2label" in settings:
        if len(settings["id2label"]) != found:
            raise ValueError(
                f"`id2label` names {len(settings['id2label'])} labels, and {type(backbone).__name__} answers with "
                f"{found}. Correct it."
            )
        return settings
    names = label_names({}, found)
    if names is None:
        return {**settings, "num_labels": found}
    return {**settings, "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _channels(backbone: nn.Module) -> int:
    """Return how many channels the first convolution takes."""
    first = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def _describe(backbone: nn.Module, settings: dict[str, Any]) -> ScanConfig:
    """Return a configuration that makes the backbone again, where there is one."""
    name, found = settings.pop("backbone", None), "custom"
    if isinstance(backbone, TransformersBackbone):
        name, found = backbone.config.model_type, "transformers"
        settings["backbone_kwargs"] = arguments_of(backbone.config)
    elif type(backbone).__module__.startswith("torchvision."):
        labels = settings.get("num_labels") or len(settings["id2label"])
        name, found = name or find_torchvision(backbone, labels), "torchvision"
    if name is not None and found != "custom":
        config = ScanConfig(backbone_source=found, backbone=name, **settings)
        fill_in(config, backbone)
        if (difference := _difference(backbone, config)) is None:
            return config
        if settings.get("backbone_kwargs"):
            raise ValueError(
                f"The module is not what {found} makes of {name!r} with {config.backbone_kwargs}: {difference}. "
                "Correct `backbone` and `backbone_kwargs`."
            )
    settings.pop("backbone_kwargs", None)
    return ScanConfig(backbone_source="custom", backbone=type(backbone).__name__, **settings)


@torch.no_grad()
def _difference(backbone: nn.Module, config: ScanConfig) -> str | None:
    """Return in what a backbone differs from the one that a configuration makes, with the same weights."""
    made = create_backbone(config)
    try:
        made.load_state_dict(backbone.state_dict())
    except RuntimeError as error:
        return " ".join(str(error).split())[:300]
    example = next(backbone.parameters())
    made = made.to(device=example.device, dtype=example.dtype)
    if isinstance(backbone, TransformersBackbone):
        made.config._attn_implementation = backbone.config._attn_implementation
    assert config.image_size is not None  # it has been filled in
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size, generator=generator)
    images = images.to(device=example.device, dtype=example.dtype)
    with evaluating(backbone), evaluating(made):
        same = torch.equal(backbone(images), made(images))
    return None if same else "the weights fit, and the answers differ"


def _as_preprocessing(given: Any) -> dict[str, Any]:
    """Return preprocessing as `config.preprocessing` holds it, from that or from what prepares images."""
    if isinstance(given, dict):
        return given
    names = ("image_mean", "image_std") if hasattr(given, "image_mean") else ("mean", "std")
    mean, std = (getattr(given, name, None) for name in names)
    if mean is None or std is None:
        raise ValueError(
            f"`preprocessing` is a {type(given).__name__}; expected a dictionary such as "
            "{'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5]}, an image processor or torchvision's `transforms()`."
        )
    found: dict[str, Any] = {"mean": [float(one) for one in mean], "std": [float(one) for one in std]}
    crop, resize = (_edge(getattr(given, name, None)) for name in ("crop_size", "resize_size"))
    if crop and resize:
        found["crop_pct"] = crop / resize
    elif getattr(given, "crop_pct", None):
        found["crop_pct"] = float(given.crop_pct)
    elif not getattr(given, "do_center_crop", False):
        found["crop_pct"] = 1.0
    interpolation = str(getattr(getattr(given, "interpolation", None), "value", ""))
    resample = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(getattr(given, "resample", -1))
    if resample or interpolation in ("nearest", "bilinear", "bicubic"):
        found["interpolation"] = resample or interpolation
    return found


def _edge(size: Any) -> int | None:
    """Return the first side of a size in one of the forms that there are."""
    if isinstance(size, dict) or hasattr(size, "get"):
        size = next((size.get(name) for name in ("shortest_edge", "height") if size.get(name)), None)
    elif isinstance(size, (list, tuple)):
        size = size[0] if size else None
    return size if isinstance(size, int) else None


__all__ = ["ModuleConversionMixin"]
