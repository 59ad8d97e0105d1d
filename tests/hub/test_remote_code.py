"""A checkpoint with its code, where there is nothing but PyTorch, timm and Transformers."""

import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import torch
from packaging.requirements import Requirement

from hf_scan import ExitConfig

from ..conftest import random_scan_model


BARE = ("torch", "torchvision", "timm", "transformers")

ANSWER = """
import sys, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
torch.set_num_threads(1)
model = AutoModelForImageClassification.from_pretrained("alice/net", trust_remote_code=True)
AutoImageProcessor.from_pretrained("alice/net")
images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(images).logits
answers = model.predict_adaptive(images)
torch.save((logits, answers.logits, answers.exit_index, type(model).__module__), sys.argv[1])
"""


def bare_python(folder: Path) -> Path:
    """A virtual environment with links to these packages and to what they need, and to nothing else."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    waiting, known = list(BARE), set()
    while waiting:
        package = distribution(waiting.pop())
        if package.name in known:
            continue
        known.add(package.name)
        for need in map(Requirement, package.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))).resolve())
    return folder / "bin" / "python"


def test_bits_are_the_same_without_the_package(hub, tmp_path):
    model = random_scan_model(image_size=32)
    model.exit_config = ExitConfig(thresholds=[0.5, 0.6, 0.8])
    model.save_pretrained(tmp_path / "net")
    push = """
import sys
from hf_scan import ScanForImageClassification
ScanForImageClassification.from_pretrained(sys.argv[1]).push_to_hub("alice/net", include_code=True)
"""
    hub.run(push, tmp_path / "net")
    hub.run("import hf_scan" + ANSWER, tmp_path / "with")

    python = bare_python(tmp_path / "bare")
    environment = hub.environment(user="bob")
    del environment["PYTHONPATH"]
    for package in ("hf_scan", "datasets", "pygad"):
        code = f"import importlib.util; assert importlib.util.find_spec({package!r}) is None"
        subprocess.run([python, "-c", code], env=environment, cwd=tmp_path, check=True)
    done = subprocess.run(
        [python, "-c", ANSWER, tmp_path / "without"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = torch.load(tmp_path / "with"), torch.load(tmp_path / "without")
    for one, other in zip(ours[:3], theirs[:3]):
        assert torch.equal(one, other)
    assert len(ours[2].unique()) > 1
    assert ours[3] == "hf_scan.model.modeling_scan"  # where the package is, no other code runs
    assert theirs[3].startswith("transformers_modules.")
