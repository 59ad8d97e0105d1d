"""The graphs of an export in OpenVINO, for `deploy.py`: the same engine with other sessions. Needs `openvino`."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from hf_scan.runtime import ORTScanForImageClassification


class _Session:
    """A compiled graph that is called as a session of ONNX Runtime is."""

    def __init__(self, path: Path, threads: int) -> None:
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.path, self.settings = path, {**settings, "PERFORMANCE_HINT": "LATENCY"}
        self.requests: dict[int, Any] = {}

    def run(self, _: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        # The plain network is compiled for each batch size, which is its fastest form; batches that shrink cannot be.
        size = len(next(iter(feeds.values()))) if self.path.name == "plain.onnx" else 0
        if size not in self.requests:
            model = openvino.Core().read_model(self.path)
            if size:
                model.reshape({value.any_name: [size, *value.partial_shape[1:]] for value in model.inputs})
            self.requests[size] = openvino.compile_model(model, "CPU", self.settings).create_infer_request()
        answers = self.requests[size].infer(feeds, share_inputs=True, share_outputs=True)
        return [answers[index] for index in range(len(answers))]


class _Sessions:
    """In place of [`~hf_scan.runtime.sessions.Sessions`]."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.opened: dict[str, _Session] = {}

    def __getitem__(self, name: str) -> _Session:
        if name not in self.opened:
            self.opened[name] = _Session(self.folder / name, self.threads)
        return self.opened[name]


def openvino_engine(folder: Path, threads: int, subfolder: str = "") -> Any:
    """
    Load an export into OpenVINO.

    Args:
        folder (`Path`): The export.
        threads (`int`): Threads of each graph.
        subfolder (`str`, *optional*): Such as `"int8"`.
    """
    engine: Any = ORTScanForImageClassification.from_pretrained(folder, subfolder=subfolder)
    engine._sessions = _Sessions(engine.folder / "onnx", threads)
    return engine


__all__ = ["openvino_engine"]
