# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Load a network to be served, so that what happens to its files later does not touch it."""

import shutil
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass
class LoadedModel:
    """
    A network with its image processor.

    Args:
        name (`str`): The folder or repository that it was loaded from.
        model ([`ScanForImageClassification`] or [`~hf_scan.runtime.ORTScanForImageClassification`]): The network.
        processor (`BaseImageProcessor`): Its image processor.
        files (`dict[str, tuple[int, int]]`): Size and time of the files it was loaded from, if it was a folder.
    """

    name: str
    model: Any
    processor: Any
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    def files_changed(self) -> bool:
        """Return whether the folder holds something else by now, which takes a restart to be served."""
        return _files_of(Path(self.name)) != self.files if self.files else False


def load_model(name: str, threads: int | None = None) -> LoadedModel:
    """
    Load a network and its image processor from a folder or the Hub. No file of it is read or mapped after that.

    Args:
        name (`str`): The folder or repository of a trained network, or the folder of an export.
        threads (`int`, *optional*): Threads that a stage is computed with. Defaults to the runtime's own choice.

    Raises:
        `OSError`: if there is no such network, or it has no image processor.
    """
    files = _files_of(Path(name))
    processor = import_module("transformers").AutoImageProcessor.from_pretrained(name)
    model = _load_export(name, threads) if Path(name, "onnx").is_dir() else _load_checkpoint(name, threads)
    return LoadedModel(name, model, processor, files)


def _load_checkpoint(name: str, threads: int | None) -> Any:
    torch = import_module("torch")
    if threads is not None:
        torch.set_num_threads(threads)
    model = import_module("hf_scan.model.modeling_scan").ScanForImageClassification.from_pretrained(name).eval()
    for values in (*model.parameters(), *model.buffers()):
        values.data = values.data.clone()  # or it may lie in the mapped file, which somebody may cut short
    return model.to(memory_format=torch.channels_last)


def _load_export(name: str, threads: int | None) -> Any:
    runtime = import_module("hf_scan.runtime")
    options = None if threads is None else runtime.threaded_options(threads)
    scratch = tempfile.TemporaryDirectory(prefix="hf_scan-serve-")
    # ONNX Runtime maps the weights of a file, and opens graphs as they are needed.
    folder = Path(shutil.copytree(name, Path(scratch.name, "model")))
    model = runtime.ORTScanForImageClassification.from_pretrained(folder, session_options=options)
    model.open_sessions()
    model._scratch = scratch  # which lives as long as the engine
    return model


def _files_of(folder: Path) -> dict[str, tuple[int, int]]:
    if not folder.is_dir():
        return {}
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


__all__ = ["LoadedModel", "load_model"]
