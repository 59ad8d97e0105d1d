# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Create the backbone that a [`ScanConfig`] describes."""

from typing import Any

import timm
from huggingface_hub.errors import StrictDataclassError
from timm.data import resolve_data_config

from .configuration_scan import PREPROCESSING_KEYS, ScanConfig
from .named_errors import shown
from .torchvision_backbones import create_torchvision
from .transformers_backbones import create_family
from .weight_files import limited_tensors, most_tensors


LARGEST_TABLE = 4096

# What timm raises for arguments that it does not take.
NOT_MADE = (
    *(RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError),
    NotImplementedError,
)


def _check_image_size(config: ScanConfig) -> None:
    """Refuse sizes for which a network that is made for one size would compute tables too large for memory."""
    arguments = backbone_arguments(config)
    for name in ("img_size", "input_size", "image_size"):
        size = arguments.get(name)
        sizes = size if isinstance(size, (list, tuple)) else [size]
        if any(isinstance(side, int) and side > LARGEST_TABLE for side in sizes):
            raise ValueError(
                f"`image_size` or `backbone_kwargs` make {config.backbone!r} for images of {size} pixels; expected at "
                f"most {LARGEST_TABLE} for a network that is made for one size."
            )


def create_backbone(config: ScanConfig) -> Any:
    """Create a backbone with new weights. While weights are loaded, it must not be far larger than they are."""
    _check_image_size(config)
    if config.backbone_source == "custom":
        raise ValueError(
            f"`backbone_source` is 'custom': the network is made of a {config.backbone}, a module that no "
            "configuration can make. Convert the module with `from_module`."
        )
    with limited_tensors(most_tensors(config.truncated)):
        if config.backbone_source != "timm":
            return _create_other(config)
        return create_timm_model(config.backbone, num_classes=config.num_labels, **backbone_arguments(config))


def _create_other(config: ScanConfig) -> Any:
    """Create a backbone of torchvision or Transformers."""
    arguments = backbone_arguments(config)
    try:
        if config.backbone_source == "torchvision":
            return create_torchvision(config.backbone, config.num_labels, arguments)
        beside = {name: arguments[name] for name in ("num_channels", "image_size") if name in arguments}
        return create_family(config.backbone, config.backbone_kwargs, num_labels=config.num_labels, **beside)
    except (*NOT_MADE, StrictDataclassError) as error:
        raise ValueError(
            f"{config.backbone_source} cannot make {config.backbone!r} with {shown(arguments, 300)}: "
            f"{' '.join(str(error).split())[:300] or repr(error)}. Correct `backbone` or `backbone_kwargs`."
        ) from error


def fill_in(config: ScanConfig, backbone: Any) -> None:
    """
    Fill in image size and preprocessing where a configuration leaves them to the backbone.

    Raises:
        `ValueError`: if the backbone does not say which images it was made for.
    """
    known = getattr(backbone, "pretrained_cfg", None) or {}
    own = getattr(backbone, "image_size", None)  # of torchvision's transformers
    size = config.image_size or (known["input_size"][-1] if "input_size" in known else own)
    if not isinstance(size, int):
        raise ValueError(
            f"{type(backbone).__name__} does not say which images it was made for; expected `image_size` in pixels, "
            "such as 224."
        )
    config.image_size = size
    config.preprocessing = timm_preprocessing(known or {"input_size": (3, size, size)}) | (config.preprocessing or {})


def backbone_arguments(config: ScanConfig) -> dict[str, Any]:
    """Return the arguments of the backbone's constructor for a configuration, without the number of classes."""
    if config.backbone_source == "torchvision":
        size = {"image_size": config.image_size} if config.backbone.startswith("vit_") and config.image_size else {}
        return {**size, **config.backbone_kwargs}
    if config.backbone_source == "transformers":
        size = {} if config.image_size is None else {"image_size": config.image_size}
        return {"num_channels": config.num_channels, **size, **config.backbone_kwargs}
    arguments = {"in_chans": config.num_channels, **config.backbone_kwargs}
    return {**size_argument(config.backbone, config.image_size), **arguments}


def size_argument(name: str, image_size: int | None) -> dict[str, int]:
    """Return the image size as an argument of networks that are made for one. timm looks a name with a source up."""
    pretrained_cfg = timm.get_pretrained_cfg(name) if ":" not in name else None
    fixed = image_size is not None and pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    return {"img_size": image_size} if fixed else {}  # type: ignore[dict-item]


def create_timm_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """
    Create a model of timm.

    Raises:
        `ValueError`: if timm cannot make it of these arguments, for which it raises errors of many kinds.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except NOT_MADE as error:
        said = str(error) if isinstance(error, (RuntimeError, TypeError)) and str(error) else repr(error)
        raise ValueError(
            f"timm cannot make {name!r} with {shown(kwargs, 300)}: {said[:300]}. Correct the name or "
            "`backbone_kwargs`."
        ) from error


def timm_preprocessing(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the preprocessing of a timm model, as `config.preprocessing` holds it."""
    settings = resolve_data_config(pretrained_cfg=pretrained_cfg)
    # As JSON gives them back.
    values = {name: settings[name] for name in sorted(PREPROCESSING_KEYS)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


__all__ = ["backbone_arguments"]


def check_image_size(backbone: Any, height: int, width: int) -> None:
    """Raise a `ValueError` for images that a network made of patches does not take, as timm's patches say."""
    patches: Any = getattr(backbone, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is None:
        return
    fits, expected = True, ""
    if getattr(patches, "strict_img_size", False):
        fits, expected = (height, width) == tuple(size), f"{tuple(size)}, the size that this network was made for"
    elif not getattr(patches, "dynamic_img_pad", True):
        patch = tuple(patches.patch_size)
        fits, expected = not (height % patch[0] or width % patch[1]), f"whole patches of {patch}"
    if not fits:
        raise ValueError(
            f"The images have a height and width of ({height}, {width}); expected {expected}. Prepare images with the "
            "model's image processor, or make the network with another `image_size`."
        )
