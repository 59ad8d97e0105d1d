# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Run an export with OpenVINO: [`OVScanForImageClassification`]."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from .engine import ExportedScan
from .manifest import WEIGHTS_NAME, Manifest, check_weights_beside
from .sessions import Sessions, available_cores


# OpenVINO would compute in bfloat16 where a processor has it, and answers would differ from the exported network's.
DEFAULTS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
# The plain network is compiled for each batch size, its fastest form. Later sizes push out the oldest.
COMPILED_SIZES = 8


class OVSession:
    """
    A graph that OpenVINO has compiled, with the call of a session of ONNX Runtime. Each thread has its own request.

    Args:
        path (`Path`): The graph.
        device (`str`): Such as `"CPU"`.
        settings (`Mapping[str, Any]`): Properties of OpenVINO.
        by_size (`bool`): Whether to compile it for every batch size of its own.
        batch_size (`int`, *optional*): The only batch size it is run with.
    """

    def __init__(
        self, path: Path, device: str, settings: Mapping[str, Any], by_size: bool, batch_size: int | None = None
    ) -> None:
        self.path, self.device, self.settings = path, device, dict(settings)
        self.by_size, self.batch_size = by_size, batch_size
        self._compiled: dict[int | None, Any] = {}
        self._lock = threading.Lock()
        self._requests = threading.local()
        if not by_size:
            self._compile(batch_size)

    def run(self, _: None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs in order. They are copies: the request's own memory is written again by its next run."""
        size = len(next(iter(feeds.values()))) if self.by_size else self.batch_size
        request = self._request(self._compile(size))
        answers = request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        return [np.array(answers[index]) for index in range(len(answers))]

    def _compile(self, size: int | None) -> Any:
        with self._lock:
            if size not in self._compiled:
                model = openvino.Core().read_model(self.path)
                if size is not None:
                    shapes = {value.any_name: list(value.partial_shape) for value in model.inputs}
                    batched = {name: [size, *rest] for name, (first, *rest) in shapes.items() if first.is_dynamic}
                    model.reshape(batched)
                while len(self._compiled) >= COMPILED_SIZES:
                    self._compiled.pop(next(iter(self._compiled)))
                self._compiled[size] = openvino.compile_model(model, self.device, self.settings)
            return self._compiled[size]

    def _request(self, compiled: Any) -> Any:
        """Return this thread's request, made anew when it belongs to another compiled graph."""
        own = self._requests.__dict__.setdefault("own", {})
        kept = own.get(id(compiled))
        if kept is None or kept[0] is not compiled:
            while len(own) >= COMPILED_SIZES:
                own.pop(next(iter(own)))
            own[id(compiled)] = kept = (compiled, compiled.create_infer_request())
        return kept[1]


class OVSessions(Sessions):
    """
    Sessions of OpenVINO.

    Args:
        folder (`Path`): The export.
        manifest ([`Manifest`]): The manifest of the export, whose files have been checked.
        device (`str`): Such as `"CPU"`.
        settings (`Mapping[str, Any]`): Properties of OpenVINO.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: str, settings: Mapping[str, Any]) -> None:
        super().__init__(folder, manifest)
        self.device, self.settings = device, settings

    @property
    def threads(self) -> int:
        """Number of threads of each session: one per core, unless `ov_config` names another."""
        return int(self.settings.get("INFERENCE_NUM_THREADS", 0)) or available_cores()

    def _open(self, name: str) -> OVSession:
        path = self.folder / name
        check_weights_beside(path)
        only = 1 if name == "adaptive.onnx" else None
        try:
            return OVSession(path, self.device, self.settings, by_size=name == "plain.onnx", batch_size=only)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            reason = str(error).strip().splitlines()[-1][:300]
            raise OSError(
                f"OpenVINO does not load {path} ({reason}). Weights must lie in {WEIGHTS_NAME!r} beside it. Export "
                "the network again."
            ) from error


class OVScanForImageClassification(ExportedScan):
    """
    An exported network with early exits, run by OpenVINO: the same files as
    [`ORTScanForImageClassification`], the same methods and the same answers, up to rounding. In INT8, OpenVINO
    computes with kernels of its own, so logits differ: find thresholds on the engine that serves.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.runtime import OVScanForImageClassification

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> model.export_onnx("exported")
    >>> engine = OVScanForImageClassification.from_pretrained("exported")
    >>> answer = engine.predict_adaptive(np.zeros((4, 3, 32, 32), np.float32), thresholds=[0.9, 0.9])
    >>> answer.logits.shape
    (4, 10)
    ```
    """

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        export: bool = False,
        device: str = "CPU",
        ov_config: Mapping[str, Any] | None = None,
        subfolder: str = "",
        exit_config: Any = None,
        **kwargs: Any,
    ) -> "OVScanForImageClassification":
        """
        Load an exported network, with the arguments of Optimum Intel's `OVModel`.

        Args:
            model_id (`str` or `Path`): A folder that `model.export_onnx` made, or a repository on the Hub.
            export (`bool`, *optional*, defaults to `False`): Whether it is a PyTorch checkpoint to export first.
            device (`str`, *optional*, defaults to `"CPU"`): A device of OpenVINO.
            ov_config (`Mapping[str, Any]`, *optional*): Properties of OpenVINO, such as `INFERENCE_NUM_THREADS`. They
                are added to a precision of float32 and the hint for low latency.
            subfolder (`str`, *optional*): A folder in it, such as `"int8"`.
            exit_config (*optional*): Used instead of the folder's `exit_config.json`.
            kwargs: As for [`ORTScanForImageClassification.from_pretrained`].

        Raises:
            `OSError`: if there is no export, or a file of it is missing or is not what the manifest describes.
            `ValueError`: if a file names something outside of the folder, or the device is unknown.
        """
        available = openvino.Core().available_devices
        if device.split(".")[0].split(":")[0] not in (*(one.split(".")[0] for one in available), "AUTO"):
            raise ValueError(f"`device` is {device!r}, which OpenVINO does not find; expected one of {available}.")
        settings = {**DEFAULTS, **(ov_config or {})}

        def sessions(folder: Path, manifest: Manifest) -> Sessions:
            return OVSessions(folder, manifest, device, settings)

        engine: OVScanForImageClassification = cls._load(
            model_id, sessions, export, subfolder=subfolder, exit_config=exit_config, **kwargs
        )
        return engine


__all__ = ["OVScanForImageClassification", "OVSessions"]
