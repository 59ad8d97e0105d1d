"""
Transformers' own common tests, from the source distribution of the installed version.

`python -m tests.transformers_suite.source` downloads it; `load` imports from it. What a source distribution lacks has
a stand-in here, and is named by `MISSING`, which the download prints.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers


ROOT = Path(__file__).parents[2] / ".transformers-tests"
FOLDER = ROOT / f"transformers-{transformers.__version__}" / "tests"
PACKAGE = "transformers_tests"

MISSING = {
    "exporters.test_export": "tests of torch.export, ONNX and ExecuTorch; here: tests/model, tests/runtime",
    "generation.test_utils": "tests of generation, which classifiers do not have",
    "pipelines.test_pipelines_image_classification": "tests of the pipeline; here: tests/test_pipeline.py",
    "models.*": "tests of single models",
    "utils.test_configuration_utils": "values of common configuration fields; here: CONFIG_COMMON_KWARGS",
}

# Every field that all configurations have, with another value than its default.
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "architectures": ["SomeModel"],
    "id2label": {0: "one", 1: "other"},
    "label2id": {"one": 0, "other": 1},
    "problem_type": "single_label_classification",
}


def download() -> None:
    """Download the source distribution of the installed Transformers, unless it is here, and unpack its tests."""
    version = transformers.__version__
    if not (FOLDER / "test_modeling_common.py").exists():
        requirement = f"transformers=={version}"
        with tempfile.TemporaryDirectory() as folder:
            options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
            done = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement])
            archives = list(Path(folder).glob("*.tar.gz"))
            if done.returncode or not archives:
                sys.exit(f"No tests were run: the package registry gives no source distribution of {requirement}.")
            with tarfile.open(archives[0]) as archive:
                members = [member for member in archive.getmembers() if "tests" in Path(member.name).parts[1:2]]
                archive.extractall(ROOT, members, filter="data")
    print(f"Transformers {version}: {len(list(FOLDER.glob('*.py')))} files of tests. Not in its source distribution:")
    for name, what in MISSING.items():
        assert not (FOLDER / f"{name.replace('.', '/')}.py").exists(), f"{name} is there; use it"
        print(f"  tests.{name}: {what}")


def load(name: str) -> types.ModuleType:
    """Import a module of Transformers' tests, such as `"test_modeling_common"`."""
    if PACKAGE not in sys.modules:
        if not FOLDER.exists():
            raise ImportError(f"{FOLDER} is not there; run `make test-transformers`, which downloads it.")
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        sys.modules[PACKAGE] = package
        _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
        # The configuration's test reads Transformers from beside the tests; it is the installed one.
        transformers.utils.direct_transformers_import = lambda *args, **kwargs: transformers
    return importlib.import_module(f"{PACKAGE}.{name}")


def _stand_in(name: str, **members: object) -> None:
    parent, _, child = name.rpartition(".")
    package = sys.modules.setdefault(f"{PACKAGE}.{parent}", types.ModuleType(f"{PACKAGE}.{parent}"))
    module = types.ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(members)
    setattr(package, child, module)
    sys.modules[f"{PACKAGE}.{name}"] = module


if __name__ == "__main__":
    download()
