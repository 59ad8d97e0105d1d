# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Create the timm model that a [`ScanConfig`] describes."""

from typing import Any

import timm
from timm.data import resolve_data_config

from .configuration_scan import PREPROCESSING_KEYS, ScanConfig


def create_backbone(config: ScanConfig) -> Any:
    return create_timm_model(config.backbone, num_classes=config.num_labels, **backbone_arguments(config))


def backbone_arguments(config: ScanConfig) -> dict[str, Any]:
    """What `timm.create_model` is given of a configuration, besides the number of classes."""
    arguments = {"in_chans": config.num_channels, **config.backbone_kwargs}
    return {**size_argument(config.backbone, config.image_size), **arguments}


def size_argument(name: str, image_size: int | None) -> dict[str, int]:
    """Only networks that are made for one size are told it. A name with a source is looked up by timm itself."""
    pretrained_cfg = timm.get_pretrained_cfg(name) if ":" not in name else None
    fixed = image_size is not None and pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    return {"img_size": image_size} if fixed else {}  # type: ignore[dict-item]


def create_timm_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"timm cannot make {name!r} with {kwargs}: {error}. Correct the name or `backbone_kwargs`."
        ) from error


def timm_preprocessing(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    settings = resolve_data_config(pretrained_cfg=pretrained_cfg)
    # As JSON gives them back.
    values = {name: settings[name] for name in sorted(PREPROCESSING_KEYS)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


__all__ = ["backbone_arguments"]
