import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


# Before anything of Hugging Face is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging

from hf_scan import ScanConfig, ScanForImageClassification


disable_progress_bar()
logging.disable_progress_bar()


def random_scan_model(seed: int = 0, **config) -> ScanForImageClassification:
    """A network whose exits disagree and whose batch norms are not the identity, as after training."""
    torch.manual_seed(seed)
    config = {"backbone": "cifar_resnet20", "num_labels": 5, "image_size": 16, **config}
    model = ScanForImageClassification(ScanConfig(**config)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
        # Logits of unit variance around 0 at every exit, so that confidences are all over (1 / num_labels, 1).
        pixels = torch.randn(64, 3, model.config.image_size, model.config.image_size)
        classifiers = [*(head.classifier.fc for head in model.exit_heads), model.backbone.get_classifier()]
        for classifier, logits in zip(classifiers, model(pixels).exit_logits):
            scale = 1.3 / logits.std(dim=0)
            classifier.weight.mul_(scale[:, None])
            classifier.bias.copy_((classifier.bias - logits.mean(dim=0)) * scale)
    return model


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a number of bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def torchrun(module: str, *arguments: object, processes: int = 2) -> str:
    """Runs a module of the tests in several processes; what it printed. `accelerate launch --cpu` would start one."""
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", processes, "-m", module]
    done = subprocess.run(
        [str(part) for part in (*command, *arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def model() -> ScanForImageClassification:
    """Shared by the tests that only read it."""
    return random_scan_model()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
