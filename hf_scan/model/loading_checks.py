# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Check what Transformers loads of a checkpoint: which weights, whether whole, and whose thresholds."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_peft_available, logging

from .backbone import create_backbone
from .exit_config import EXIT_CONFIG_NAME, ExitConfig
from .hub_files import find_file
from .weight_files import SAFETENSORS_DTYPES, CheckpointWeights, find_weight_files


logger = logging.get_logger(__name__)

ADAPTER = "adapter_config.json"


def weights_to_load(
    name: str | os.PathLike[str] | None, kwargs: dict[str, Any], access: dict[str, Any]
) -> CheckpointWeights:
    """Return a view of the weights that are about to be loaded."""
    where = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key)}
    # Transformers has fetched the files by the time they are looked for.
    local = {**access, "local_files_only": True}

    def find() -> list[Path]:
        return (
            []
            if name is None
            else find_weight_files(lambda file: find_file(name, file, **local, **where), kwargs.get("variant"))
        )

    return CheckpointWeights(
        str(name), find, kwargs.get("state_dict"), bool(kwargs.get("ignore_mismatched_sizes", False))
    )


def check_no_adapter(name: str | os.PathLike[str], kwargs: dict[str, Any], access: dict[str, Any]) -> None:
    """Raise a `ValueError` if a checkpoint holds an adapter, by which Transformers would load another model."""
    where = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key)}
    if is_peft_available() and find_file(name, ADAPTER, **access, **where) is not None:
        raise ValueError(
            f"{name} holds {ADAPTER!r}, by which Transformers would load what that names instead. Adapters are not "
            "supported; remove the file."
        )


def check_backbone_is_whole(name: str | os.PathLike[str] | None, info: dict[str, Any]) -> None:
    """Raise a `ValueError` if weights of the backbone were missing, which Transformers initialises at random."""
    missing = sorted(key for key in info["missing_keys"] if key.startswith("backbone."))
    if missing:
        raise ValueError(
            f"The weights of {name or '`state_dict`'} lack {len(missing)} of the backbone's, the first being "
            f"{missing[0]!r}. Load a whole checkpoint, or correct `backbone` in its config.json."
        )


@torch.no_grad()
def initialise_as_timm(model: PreTrainedModel, keys: list[str]) -> None:
    """Initialise tensors of the backbone that had another shape as timm does. Transformers knows common layers."""
    names = [key.removeprefix("backbone.") for key in keys if key.startswith("backbone.")]
    if not names:
        return
    fresh, own = create_backbone(model.config).state_dict(), model.backbone.state_dict()
    for name in names:
        own[name].copy_(fresh[name])


def of_these_weights(
    exit_config: ExitConfig, model: PreTrainedModel, weights: CheckpointWeights, changed: bool
) -> ExitConfig:
    """Return an exit configuration without what does not hold for the network that was loaded."""
    if changed and exit_config.costs is not None:
        exit_config = exit_config.replace(costs=None)
    if not exit_config.thresholds:
        return exit_config
    if changed:
        logger.warning(
            "The network is not the one that was saved, so the checkpoint's thresholds do not belong to it and are "
            "left out. Find others with `hf_scan.calibrate` once the model is trained."
        )
        return exit_config.replace(thresholds=None, temperatures=None)
    if exit_config.weights is None or not weights.shapes:
        return exit_config
    if weights.given is not None:
        found = model.fingerprint()
    else:
        state = model.state_dict()
        found = weights.fingerprint(state, f"{model.base_model_prefix}.")
    if found != exit_config.weights:
        logger.warning(
            f"The weights of {weights.source} are not those that the thresholds of {EXIT_CONFIG_NAME} were found for, "
            "which are left out. Find others with `hf_scan.calibrate`."
        )
        return exit_config.replace(thresholds=None, temperatures=None)
    if SAFETENSORS_DTYPES.get(model.dtype) not in weights.dtypes:
        # The same weights in another type, which are saved under their own fingerprint.
        return exit_config.replace(weights=model.fingerprint())
    return exit_config


__all__ = [
    "check_backbone_is_whole",
    "check_no_adapter",
    "initialise_as_timm",
    "of_these_weights",
    "weights_to_load",
]
