import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hf_scan import ExitConfig
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.runtime import ExitSettings

from ..conftest import random_scan_model


NUM_LABELS = 10
FAULTY, FATAL = -1.0, -2.0  # stages that run for such an image fail; end their thread


class FakeExport:
    """
    An exported network of three stages in NumPy. An "image" holds the exit it leaves at and the label it gets:
    `[depth, label]`. Stages that are held run when `gate` is set.
    """

    num_exits = 3

    def __init__(self, thresholds=(0.9, 0.9)):
        self.exit_config = ExitSettings(thresholds=list(thresholds), fallback="deepest")
        self.manifest = SimpleNamespace(image={"shape": [2], "dtype": "float32"})
        names = {label: f"label {label}" for label in range(NUM_LABELS)}
        self.config = SimpleNamespace(id2label=names, problem_type=None, num_labels=NUM_LABELS)
        self.ran: list[tuple[int, list[float]]] = []  # which stage, for which labels
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, index, state, head):
        images = state[0]
        self.entered.set()
        self.gate.wait(60)
        self.ran.append((index, images[:, 1].tolist()))
        if (images[:, 0] == FATAL).any():
            raise SystemExit("the interpreter goes down")
        if (images[:, 0] == FAULTY).any():
            raise ValueError("This image cannot be run.")
        logits = np.zeros((len(images), NUM_LABELS), np.float32)
        sure = np.where(images[:, 0] <= index, 20, 1)
        logits[np.arange(len(images)), images[:, 1].astype(int)] = sure
        return [images], logits


def image(depth: float, label: int = 0) -> np.ndarray:
    return np.array([depth, label], np.float32)


@pytest.fixture
def fake() -> FakeExport:
    return FakeExport()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A network with thresholds and its image processor. Tests only read it."""
    folder = tmp_path_factory.mktemp("serving") / "model"
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.6, 0.6])
    model.save_pretrained(folder)
    create_image_processor(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The same, exported."""
    folder = tmp_path_factory.mktemp("serving") / "exported"
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.6, 0.6])
    model.export_onnx(folder)
    create_image_processor(model).save_pretrained(folder)
    return folder
