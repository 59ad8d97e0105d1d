"""The wheel, as someone installs it who only wants answers: without an extra, in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from hf_scan import ExitConfig
from hf_scan.model.image_processing_scan import create_image_processor

from .conftest import random_scan_model


PROJECT = Path(__file__).parent.parent
# What extras bring, and nothing that is needed to answer does.
HIDDEN = ("accelerate", "datasets", "evaluate", "gradio", "matplotlib", "onnx", "onnxruntime", "pygad", "scipy")

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    done.stdout += done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, in which nothing of an earlier build lies about."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source / name)
    shutil.copytree(PROJECT / "hf_scan", source / "hf_scan", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    done = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = folder.glob("*.whl")
    return path


def required(names: list[str]) -> set[str]:
    """Distributions that these need, directly or by others, extras left out."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """A Python that has the wheel and what it names as needed; links to this environment's packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().split("\n\n")[0].splitlines()
    needed = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    for name in required([requirement.name for requirement in needed if requirement.marker is None]):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(installed.locate_file(top))
    install = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    done = run(sys.executable, "-m", "pip", *install, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:]
    return python


def test_recipes_and_templates_are_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = ("recipes/*.yaml", "reporting/templates/*.md", "py.typed", "**/*.py")
    sources = {path.relative_to(PROJECT).as_posix() for kind in kept for path in (PROJECT / "hf_scan").glob(kind)}
    assert sources <= names
    assert {"hf_scan/recipes/digits.yaml", "hf_scan/reporting/templates/model_card.md"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"hf_scan"}


def test_answers_without_extras(bare, tmp_path):
    code = f"import json; from importlib.util import find_spec; print(json.dumps([find_spec(n) for n in {HIDDEN}]))"
    assert json.loads(run(bare, "-c", code, cwd=tmp_path).stdout) == [None] * len(HIDDEN)
    model = random_scan_model(num_labels=2)
    model.exit_config = ExitConfig(thresholds=[0.7, 0.7])
    model.save_pretrained(tmp_path / "saved")
    create_image_processor(model).save_pretrained(tmp_path / "saved")
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "photo.png")
    command = bare.parent / "hf-scan"
    done = run(command, "predict", tmp_path / "saved", "photo.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "photo.png: LABEL_" in done.stdout
    done = run(command, "measure", tmp_path / "saved", "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    for name, extra in {"train": "train", "calibrate": "calibrate", "equip": "calibrate"}.items():
        done = run(command, name, "--help", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stdout.strip().splitlines()[-1].endswith(f"`pip install 'hf_scan[{extra}]'`.")


def test_modules_say_which_extra_they_need(bare, tmp_path):
    """
    Every module of the wheel is imported, or says in one sentence what to install. Left out are modules that others of
    their room import: those of ONNX, and the metric that `evaluate` loads by its path.
    """
    code = """
import importlib, pathlib, hf_scan
folder = pathlib.Path(hf_scan.__file__).parent
assert "site-packages" in str(folder), folder
for path in sorted(folder.rglob("*.py")):
    name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith(("hf_scan.runtime.", "hf_scan.metrics.")):
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:
        if "pip install" not in str(error):
            print(name, type(error).__name__, error)
"""
    done = run(bare, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Error" not in done.stdout
