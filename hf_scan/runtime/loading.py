# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Read the configurations of an exported network, from a folder or the Hub."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..model.named_errors import named_download_errors
from .manifest import ONNX_FOLDER, Manifest
from .numpy_rule import ExitSettings


CONFIG_NAME = "config.json"
EXIT_CONFIG_NAME = "exit_config.json"


def read_config(folder: Path, manifest: Manifest) -> Any:
    """Return the [`ScanConfig`], or its values as a namespace where Transformers is not installed."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise OSError(f"{folder} holds no {CONFIG_NAME!r}. Name a folder that `model.export_onnx(folder)` made.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = values.get("id2label") or {str(index): f"LABEL_{index}" for index in range(manifest.num_labels)}
        id2label = {int(index): name for index, name in names.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a configuration ({error}). Export the network anew.") from error
    if len(id2label) != manifest.num_labels:
        raise ValueError(
            f"{path} names {len(id2label)} labels, and the exported network has {manifest.num_labels}: the "
            "configuration is of another network. Export it anew."
        )
    if _has_torch():
        from ..model.configuration_scan import ScanConfig

        return ScanConfig.from_pretrained(folder)
    label2id = {name: index for index, name in id2label.items()}
    rest = {"problem_type": None, **values, "id2label": id2label, "label2id": label2id}
    return SimpleNamespace(**{**rest, "num_labels": manifest.num_labels})


def read_exit_config(folder: Path) -> Any:
    """Return the [`ExitConfig`], or [`ExitSettings`] where PyTorch is not installed."""
    if _has_torch():
        from ..model.exit_config import ExitConfig

        return ExitConfig.from_pretrained(folder)
    path = folder / EXIT_CONFIG_NAME
    if not path.is_file():
        return ExitSettings()
    try:
        return ExitSettings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a valid exit configuration: {error} Find thresholds anew with `hf_scan.calibrate`, or "
            "remove the file."
        ) from error


def download(model_id: Any, subfolder: str, **kwargs: Any) -> Path:
    """Download an export from the Hub and return its folder."""
    if find_spec("huggingface_hub") is None:
        raise OSError(
            f"{model_id} is not a folder, and huggingface_hub, which would load it from the Hub, is not installed."
        )
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    names = [CONFIG_NAME, EXIT_CONFIG_NAME, "preprocessor_config.json", f"{ONNX_FOLDER}/*"]
    with named_download_errors(str(model_id)):
        folder = snapshot_download(str(model_id), allow_patterns=[prefix + name for name in names], **kwargs)
    return Path(folder, subfolder)


def _has_torch() -> bool:
    return find_spec("torch") is not None and find_spec("transformers") is not None


__all__ = ["CONFIG_NAME", "EXIT_CONFIG_NAME", "download", "read_config", "read_exit_config"]
