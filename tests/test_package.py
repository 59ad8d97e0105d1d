import ast
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import hf_scan


PACKAGE = Path(hf_scan.__file__).parent
# In the order in which they may import one another; a checkpoint can carry them.
PORTABLE = [
    "cifar_backbones",
    "configuration_scan",
    "stages",
    "exit_heads",
    "exit_criteria",
    "hub_files",
    "adaptive",
    "adaptive_stream",
    "image_processing_scan",
    "modeling_scan",
]
BROUGHT = {"torch", "timm", "transformers", "huggingface_hub", "safetensors"}


@pytest.mark.parametrize("module", PORTABLE)
def test_portable_modules_import_upwards_and_little(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    # What is tried only, Transformers does not ask for.
    tried = {child for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            # `from .x import y` is the one form in which Transformers sees that the file is needed.
            assert node.module in PORTABLE[: PORTABLE.index(module)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in names}
            assert roots <= BROUGHT | set(sys.stdlib_module_names) | ({"hf_scan"} if node in tried else set())


def test_answering_does_not_wait_for_what_trains():
    code = (
        "import sys, hf_scan; hf_scan.ScanForImageClassification; "
        "print([m for m in ('datasets', 'evaluate', 'pygad', 'transformers.trainer') if m in sys.modules])"
    )
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
    assert {need for need in requires("hf_scan") if "extra" not in need} == tested
