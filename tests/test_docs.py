"""README and documentation: snippets run, commands parse, links lead somewhere, figures are those of the files."""

import argparse
import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_scan import ExitConfig
from hf_scan.cli import COMMANDS, main
from hf_scan.model.image_processing_scan import create_image_processor

from .conftest import random_scan_model


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?P<mark><!-- test: (?P<kind>\w+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def snippets(path: Path) -> list[tuple[str, str]]:
    """Kind (`""`, `"slow"` or `"hub"`) and code of each Python snippet of a page."""
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [(match["kind"] or "", match["code"]) for match in found if match["language"] == "python"]


def commands(path: Path) -> list[list[str]]:
    """The command lines of a page, as lists of words."""
    lines: list[str] = []
    for match in FENCE.finditer(path.read_text(encoding="utf-8")):
        if match["language"] in ("", "bash"):
            lines += match["code"].replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


WITH_SNIPPETS = [path for path in PAGES if any(kind != "hub" for kind, _ in snippets(path))]
WITH_SLOW_ONES = [path for path in PAGES if any(kind == "slow" for kind, _ in snippets(path))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """What the pages suppose: folders of photos, of two trained networks and of weights."""
    folder = tmp_path_factory.mktemp("workspace")
    rng = np.random.default_rng(0)
    for number in range(200):
        path = folder / "photos" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (32, 32, 3)) + 120 * np.eye(3, dtype=int)[number % 2]
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    for name, labels in {"photos": 2, "quickstart": 10}.items():
        model = random_scan_model(num_labels=labels, image_size=32)
        model.exit_config = ExitConfig(thresholds=[0.7, 0.7])
        model.save_pretrained(folder / "runs" / name)
        create_image_processor(model).save_pretrained(folder / "runs" / name)
    torch.manual_seed(0)
    save_file(timm.create_model("cifar_resnet20", num_classes=5).state_dict(), folder / "weights.safetensors")
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    return folder


def run_page(path: Path, kinds: set[str]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for kind, code in snippets(path):
        if kind in kinds:
            exec(compile(code, page_id(path), "exec"), namespace)


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    torch.manual_seed(0)
    yield
    registry = pytest.importorskip("prometheus_client").REGISTRY
    for collector in list(registry._collector_to_names):
        if type(collector).__module__.startswith("hf_scan."):
            registry.unregister(collector)


@pytest.mark.parametrize("path", WITH_SNIPPETS, ids=page_id)
def test_snippets(path, in_workspace):
    run_page(path, {""})


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_SLOW_ONES, ids=page_id)
def test_snippets_that_train(path, in_workspace):
    run_page(path, {"", "slow"})


def test_there_are_snippets_and_commands():
    assert len([code for path in PAGES for _, code in snippets(path)]) >= 25
    assert len([words for path in PAGES for words in commands(path) if words[0] == "hf-scan"]) >= 15


class ParsedError(Exception):
    """Raised where a command would begin its work."""


def as_hf_scan(words: list[str]) -> list[str] | None:
    """The arguments of `hf-scan` that a command line stands for; None if it is another program."""
    scripts = {"examples/train.py": "train", "examples/calibrate.py": "calibrate", "hf-scan": None}
    for position, word in enumerate(words):
        if word in scripts and words[0] in ("hf-scan", "python", "accelerate"):
            return [*filter(None, [scripts[word]]), *words[position + 1 :]]
    return None


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_parse(path, monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(self, *args, **kwargs):
        _, left = parse(self, *args, **kwargs)
        raise ParsedError(left)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(path):
        arguments = as_hf_scan(words)
        if arguments is not None and arguments != ["--version"]:
            assert arguments[0] in COMMANDS, words
            with pytest.raises(ParsedError) as parsed:
                main(arguments)
            assert parsed.value.args == ([],), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as its renderers make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), f"{page_id(path)} links to {target}"
        if path.name != "README.md":  # the site is built of its folder alone
            assert file.is_relative_to(ROOT / "docs"), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page_id(path)} links to {target}"
    for name in re.findall(r"`((?:benchmarks|docs|examples|hf_scan|model_cards|tests)/[\w./]*)`", text):
        assert (ROOT / name).exists(), f"{page_id(path)} names {name}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r"([\w/-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES[1:])


@pytest.mark.parametrize(
    "module", ["hf_scan", *(f"hf_scan.{n}" for n in ("calibration", "costs", "data", "runtime", "serving"))]
)
def test_every_public_name_is_in_the_reference(module):
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = {path.rsplit(".", 1)[-1] for path in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    assert set(importlib.import_module(module).__all__) <= listed


def test_every_command_and_extra_is_listed():
    commands_page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", commands_page, re.MULTILINE) == list(COMMANDS)
    page = (ROOT / "docs" / "get-started" / "installation.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    names = set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    assert set(re.findall(r"`\[(\w+)\]`", page)) == names
    assert set(re.findall(r"`\[(\w+)\]`", (ROOT / "README.md").read_text(encoding="utf-8"))) <= names


def test_every_page_is_in_the_list_for_language_models():
    text = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([\w/-]+\.html)\)", text)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in PAGES[1:])


def readme_results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_results", ROOT / "benchmarks" / "readme_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_what_the_results_say():
    """Else `python benchmarks/readme_results.py` writes it."""
    module = readme_results()
    assert module.load_rows()
    for path, text in module.expected_files().items():
        assert path.read_text(encoding="utf-8") == text


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert {"make quickstart", "make test"} <= {" ".join(words) for words in commands(ROOT / "README.md")}
    [(_, code)] = snippets(ROOT / "README.md")
    assert len(code.splitlines()) <= 15
