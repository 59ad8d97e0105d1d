# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""`onnx/manifest.json`, which describes the files of an exported network. Read and checked without PyTorch."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .numpy_rule import RULE, ExitSettings, Step


ONNX_FOLDER = "onnx"
MANIFEST_NAME = "manifest.json"
WEIGHTS_NAME = "weights.bin"
FORMAT = 1


@dataclass
class Manifest:
    """
    A description of an exported network.

    Args:
        network (`str`): [`~ScanForImageClassification.fingerprint`] of the weights that were exported.
        precision (`str`): `"float32"` or `"int8"`.
        num_labels (`int`): The width of the logits.
        image (`dict`): `dtype` and `shape` of one image.
        states (`list[list[dict]]`): The state after each stage but the last, as values with `name`, `dtype` and
            `rows_per_image`, which exceeds 1 where each window of an image is a row.
        adaptive (`dict`, *optional*): The rule in `adaptive.onnx`: `criterion`, `temperatures`, `fallback`, and
            `heads`, which of them run.
        counted (`dict`): MACs and parameters of each stage and head.
        files (`dict[str, str]`): SHA-256 of each file, by name.
        format (`int`): Version of this description.
    """

    network: str
    precision: str
    num_labels: int
    image: dict[str, Any]
    states: list[list[dict[str, Any]]]
    adaptive: dict[str, Any] | None = None
    counted: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return len(self.states) + 1

    def fingerprint(self) -> str:
        """Return SHA-256 of the weights, graphs and precision: engines that answer alike have the same."""
        kept = {name: digest for name, digest in self.files.items() if name != "adaptive.onnx"}
        return hashlib.sha256(json.dumps([self.precision, kept], sort_keys=True).encode()).hexdigest()

    def holds(self, settings: ExitSettings, plan: list[Step]) -> bool:
        """Return whether `adaptive.onnx` is there and has this rule, whatever the thresholds."""
        return (
            self.adaptive is not None
            and "adaptive.onnx" in self.files
            and self.adaptive["heads"] == [step.runs for step in plan]
            and all(self.adaptive[name] == getattr(settings, name) for name in RULE if name != "thresholds")
        )

    def save(self, folder: Path) -> None:
        """Write the manifest with the digests of the files that lie beside it."""
        self.files = {path.name: digest_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_NAME}
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """
        Read a manifest and check every file that it names.

        Raises:
            `OSError`: if there is none, or a file is missing or has another checksum than the manifest says.
            `ValueError`: if it is not a manifest, is of a newer version, or names a file outside the folder.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise OSError(
                f"{folder} holds no {MANIFEST_NAME!r}. Name a folder that `model.export_onnx(folder)` made, or pass "
                "`export=True` to export a checkpoint of PyTorch first."
            )
        manifest = cls._parsed(path)
        for name, digest in manifest.files.items():
            if Path(name).name != name or name in ("", ".", "..") or "\\" in name or os.path.isabs(name):
                raise ValueError(f"{path} names {name!r}, which is not a file beside it. Export the network anew.")
            file = folder / name
            if not file.is_file():
                raise OSError(f"{folder} lacks {name!r}, which its manifest names. Export or download it again.")
            if digest_of(file) != digest:
                raise OSError(
                    f"{file} is not the file that the manifest describes: its checksum differs, so it is truncated or "
                    "of another network. Export or download the whole folder again."
                )
        return manifest

    @classmethod
    def _parsed(cls, path: Path) -> "Manifest":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] > FORMAT:
                raise ValueError(f"its format is {values['format']}, and this version of hf_scan reads {FORMAT}")
            manifest = cls(**{entry.name: values[entry.name] for entry in fields(cls)})
            needed = {f"stage_{index}.onnx" for index in range(manifest.num_exits)} | {"plain.onnx"}
            if missing := sorted(needed - set(manifest.files)):
                raise ValueError(f"it does not name {missing}")
            for state in [value for values in manifest.states for value in values]:
                if not (isinstance(state["name"], str) and state["rows_per_image"] >= 1):
                    raise ValueError(f"it describes a state as {state}")
            np.dtype(manifest.image["dtype"])
            if len(manifest.image["shape"]) != 3:
                raise ValueError(f"it describes images of shape {manifest.image['shape']}")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a valid manifest: {error}. Export the network anew.") from error


def digest_of(path: Path) -> str:
    """Return SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def check_weights_beside(path: Path) -> None:
    """
    Raise a `ValueError` if a graph names any file but the `weights.bin` beside it.

    For a tensor outside of the graph, the graph holds an entry with the key "location" and the file as value. These
    bytes are found without a package that reads graphs. Recent versions of ONNX Runtime refuse other folders, too.
    """
    entry = b"\x0a\x08location\x12" + bytes([len(WEIGHTS_NAME)]) + WEIGHTS_NAME.encode()
    graph = path.read_bytes()
    if graph.count(b"location") != graph.count(entry):
        raise ValueError(
            f"{path} names files of weights other than {WEIGHTS_NAME!r} beside it, which is refused. Export the "
            "network anew."
        )


__all__ = ["MANIFEST_NAME", "ONNX_FOLDER", "WEIGHTS_NAME", "Manifest", "check_weights_beside", "digest_of"]
