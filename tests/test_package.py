import ast
import graphlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_scan
from hf_scan.extras import EXTRAS


PACKAGE = Path(hf_scan.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
MODULES = sorted(PACKAGE.rglob("*.py"))
# What a checkpoint with code may rely on.
BROUGHT = {"numpy", "torch", "timm", "transformers", "huggingface_hub", "safetensors", "PIL"}
# What the modules of each folder may import of the package, besides one another. CONTRIBUTING.md has the same table.
ROOMS = {
    "model": set(),
    "data": {"model"},
    "costs": {"model"},
    "runtime": {"model", "data", "costs"},
    "serving": {"model", "data", "runtime"},
    "calibration": {"model", "data", "costs", "runtime"},
    "metrics": {"model"},
    "reporting": {"model", "data", "costs", "runtime", "calibration"},
    "training": {"model", "data", "costs", "runtime", "calibration", "metrics", "reporting"},
    "demo": {"model", "data", "costs", "runtime", "calibration", "reporting"},
    "workflows": {"model", "data", "costs", "runtime", "calibration", "metrics", "reporting", "training"},
}


def imported_modules(path: Path, tree: ast.AST) -> list[str]:
    """Full names of the package's modules that a module imports, wherever in it; of names, the module they are in."""
    here = list(path.relative_to(PACKAGE.parent).parts[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*base.split("."), f"{alias.name}.py")
                found.append(f"{base}.{alias.name}" if inner.is_file() else base)
    return [name for name in found if name.split(".")[0] == "hf_scan"]


def room_of(name: str) -> str | None:
    """The folder a module lies in; None at the top of the package."""
    parts = name.split(".")[1:]
    return parts[0] if parts and PACKAGE.joinpath(parts[0]).is_dir() else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    if room is None:  # the top may import everything
        return
    above = {name for name in imported_modules(path, ast.parse(path.read_text())) if room_of(name) != room}
    above -= {"hf_scan.extras"}  # which every room may import but `model/`, of which another test tells
    assert {room_of(name) for name in above} <= ROOMS[room], f"{path} imports {sorted(above)}"


def test_every_room_is_in_the_table():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= set(ROOMS)
    contributing = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    for room, below in ROOMS.items():
        row = next(line for line in contributing.splitlines() if line.startswith(f"| `{room}/`"))
        assert set(re.findall(r"`(\w+)/`", row.split("|")[-2])) == below, row


def test_no_import_runs_in_a_circle():
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    edges = {
        name: set(imported_modules(path, ast.parse(path.read_text()))) & set(names) for name, path in names.items()
    }
    # A folder's own list of names is read by others, never by the modules in it.
    sorted_names = list(graphlib.TopologicalSorter(edges).static_order())  # raises `CycleError`
    assert len(sorted_names) == len(names)


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.stem)
def test_what_travels_with_a_checkpoint_imports_siblings_and_little_else(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            # `from .x import y` is the one form in which Transformers sees that the file is needed.
            assert node.level == 1
            assert node.module is not None
            assert (path.parent / f"{node.module}.py").is_file()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {name.split(".")[0] for name in names} <= BROUGHT | set(sys.stdlib_module_names)


def test_every_module_of_the_network_has_tests_of_its_own():
    # Parts of `stages.py` and `exit_places.py`, tested there, and what streams and server share, tested with these.
    elsewhere = {"__init__", "meta_run", "stage", "stage_scheduler", "tracing"}
    tests = {path.stem.removeprefix("test_") for path in (Path(__file__).parent / "model").glob("test_*.py")}
    assert {path.stem for path in (PACKAGE / "model").glob("*.py")} - elsewhere <= tests


def test_every_file_of_the_folder_travels_with_a_checkpoint():
    """Transformers saves the files that these two import, and what those import."""
    waiting, travelling = ["modeling_scan", "configuration_scan"], set()
    while waiting:
        name = waiting.pop()
        if name not in travelling:
            travelling.add(name)
            path = PACKAGE / "model" / f"{name}.py"
            imported = imported_modules(path, ast.parse(path.read_text()))
            siblings = [module for module in imported if module.startswith("hf_scan.model.")]
            waiting += [module.removeprefix("hf_scan.model.") for module in siblings]
    assert travelling == {path.stem for path in (PACKAGE / "model").glob("*.py")} - {"__init__"}


def test_answering_does_not_wait_for_what_trains():
    # Transformers itself imports Accelerate with its models where it is installed; `hf_scan` must not need it.
    code = (
        "import sys; sys.modules['accelerate'] = None; import hf_scan; hf_scan.ScanForImageClassification; "
        "late = ('datasets', 'evaluate', 'pygad', 'transformers.trainer'); "
        "print([module for module in late if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What works without any extra, each in a line. The rest is a sentence with the command. Older versions of Transformers
# import scikit-learn where it is installed, which only tests use, and which needs SciPy.
WITHOUT_EXTRAS = """
import sys
hidden = "accelerate datasets evaluate pygad scipy sklearn matplotlib onnx onnxruntime gradio"
for name in hidden.split():
    sys.modules[name] = None
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
import hf_scan
import hf_scan.data, hf_scan.model.image_processing_scan
from hf_scan.cli import main
model = hf_scan.ScanForImageClassification(hf_scan.ScanConfig(backbone="cifar_resnet20", image_size=16))
model.exit_config = hf_scan.ExitConfig(thresholds=[0.5, 0.5])
model.eval().save_pretrained("saved")
hf_scan.model.image_processing_scan.create_image_processor(model).save_pretrained("saved")
model = AutoModelForImageClassification.from_pretrained("saved").eval()
model.predict_adaptive(torch.zeros(1, 3, 16, 16))
hf_scan.predicted_speedup, hf_scan.measure_costs, hf_scan.realised_speedup
pipeline("image-classification", model="saved")(Image.new("RGB", (16, 16)))
hf_scan.data.eval_transform, hf_scan.data.sample_digests([])
Image.new("RGB", (16, 16)).save("photo.png")
assert main(["predict", "saved", "photo.png"]) == 0
print(hf_scan.advise("cifar_resnet20", image_size=16, runtime="macs"))
for name in hf_scan.__all__:
    try:
        getattr(hf_scan, name)
    except ImportError as error:
        print(f"MISSING {name}: {error}")
for name in ("train", "calibrate", "equip"):
    assert main([name, "--help"]) == 1
for module in ("data.columns", "data.checks", "data.folders", "metrics", "training.losses", "calibration.policy"):
    try:
        __import__(f"hf_scan.{module}")
    except ImportError as error:
        print(f"MISSING {module}: {error}")
try:
    model.export_onnx("exported")
except ImportError as error:
    print(f"MISSING export: {error}")
"""


def test_what_works_without_extras(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    missing = dict(re.findall(r"^MISSING (\S+): (.+)$", done.stdout, re.MULTILINE))
    needed = {
        "train": ["EmaCallback", "ScanTrainer", "ScanTrainingArguments", "image_splits", "data.columns"]
        + ["data.checks", "data.folders", "metrics", "training.losses"],
        "calibrate": ["ExitMonitor", "RiskBound", "calibrate", "certify_thresholds", "calibration.policy"],
        "onnx": ["export"],
    }
    for extra, names in needed.items():
        for name in names:
            assert missing.pop(name).endswith(f"not installed. `pip install 'hf_scan[{extra}]'`."), name
    assert set(missing) == {"ExitSearch", "equip", "search_exits"}  # which need two of them
    assert all("`pip install 'hf_scan[" in message for message in missing.values())
    assert done.stderr.count("hf-scan: error: ") == done.stderr.count("`pip install 'hf_scan[") == 3


def test_extras_are_those_of_the_project():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    named = re.search(r"^\[project.optional-dependencies\]$(.*?)^\[tool", project, re.MULTILINE | re.DOTALL)[1]
    assert set(EXTRAS) <= set(re.findall(r"^(\w+) = \[", named, re.MULTILINE))
    every = re.search(r'^all = \["hf_scan\[(.+?)\]"\]$', named, re.MULTILINE)[1].split(",")
    assert set(EXTRAS) <= set(every)


def test_metrics_do_not_load_the_search():
    code = "import sys, hf_scan.metrics; print([name for name in ('pygad',) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(hasattr(hf_scan, name) for name in hf_scan.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'ScanTrainr'"):
        hf_scan.ScanTrainr  # noqa: B018


def test_version_is_said_once():
    assert hf_scan.__version__ == version("hf_scan")
    assert (PACKAGE / "py.typed").is_file()


def test_lower_bounds_are_those_that_are_tested():
    pins = (Path(__file__).parent / "lower_bounds.txt").read_text().split()
    tested = {pin.replace("==", ">=") for pin in pins if "==" in pin}
    # Of the file, not of the package that was installed from it some time ago.
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    names = ("dependencies", "train", "calibrate", "plot")
    blocks = [re.search(rf"^{name} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)[1] for name in names]
    assert {pin for block in blocks for pin in re.findall(r'"(.+?)"', block)} == tested
