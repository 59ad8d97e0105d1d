"""Exports that are killed while they are written or moved: the old one or the new one, and no mixture."""

import itertools
import shutil
from pathlib import Path

import pytest

from hf_scan import ExitConfig
from hf_scan.runtime import ORTScanForImageClassification, staged_export

from ..killed_processes import killed_before


def write(target, version: str, whole: bool) -> None:
    """Write a folder in a folder and two files, of which the second version lacks one."""
    with staged_export.staged_export(target, removed=lambda name: whole or name == "exit_config.json") as new:
        (new / "onnx").mkdir(parents=True)
        for name in ("manifest.json", "weights.bin"):
            (new / "onnx" / name).write_text(version)
        (new / "config.json").write_text(version)
        if version == "first":
            (new / "exit_config.json").write_text(version)


def read(target) -> dict[str, str]:
    return {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}


@pytest.mark.parametrize("whole", [True, False], ids=["replaced", "others stay"])
def test_a_killed_export_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, whole):
    """Killed before each of the calls by which it changes a folder."""
    monkeypatch.setattr(staged_export, "IDLE_AFTER", 0)
    monkeypatch.setattr(staged_export, "ABANDONED_AFTER", -1)
    write(tmp_path / "old", "first", whole=True)
    write(tmp_path / "new", "second", whole=True)
    old, new = ({**read(tmp_path / name), "card": "mine"} for name in ("old", "new"))
    if whole:
        del new["card"]
    seen = []
    for at in itertools.count():
        target = tmp_path / str(at)
        write(target, "first", whole=True)
        (target / "card").write_text("mine")
        killed = killed_before(at, lambda target=target: write(target, "second", whole=whole))
        staged_export.finish(target)
        assert read(target) in (old, new), at
        assert not list(target.glob(".export*"))
        seen.append(read(target) == new)
        if not killed:
            break
    assert seen == sorted(seen)  # the old one up to a moment, and the new one from there on
    assert seen[-1]
    assert len(seen) > 8


def test_loading_finishes_what_was_killed(exported, tmp_path, monkeypatch):
    """The graphs are away already, and what replaces them is complete."""
    monkeypatch.setattr(staged_export, "IDLE_AFTER", 0)
    target = tmp_path / "exported"
    complete = target / ".exported-12345678"
    shutil.copytree(exported, complete / "new", ignore=shutil.ignore_patterns("int8"))
    (complete / "old").mkdir()
    (complete / "plan.json").write_text('["exit_config.json"]')
    ExitConfig(thresholds=[0.5, 0.5]).save_pretrained(target)
    assert ORTScanForImageClassification.from_pretrained(target).exit_config.thresholds is None
    assert (target / "onnx" / "manifest.json").is_file()
    assert not complete.exists()


def fail(target) -> None:
    with staged_export.staged_export(target, removed=lambda name: True) as new:
        (new / "onnx").mkdir(parents=True)
        raise RuntimeError("the network cannot be exported")


def test_an_export_that_fails_changes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="cannot be exported"):
        fail(tmp_path / "export")
    assert not any(tmp_path.iterdir())
    write(tmp_path / "export", "first", whole=True)
    with pytest.raises(RuntimeError, match="cannot be exported"):
        fail(tmp_path / "export")
    assert set(read(tmp_path / "export").values()) == {"first"}


def test_an_export_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for version in ("first", "second"):
        write(Path(), version, whole=True)
    assert set(read(tmp_path).values()) == {"second"}
