import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_scan.training.output_dirs import (
    check_replaceable,
    last_whole_checkpoint,
    lock_output_folder,
    replaced_folder,
)


CONFIG = '{"model_type": "scan"}'


def contents(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_replaces_as_a_whole_and_keeps_what_is_asked(tmp_path):
    target = tmp_path / "a" / "run"
    with replaced_folder(target) as folder:
        (folder / "model").write_text("1")
        (folder / "config.json").write_text(CONFIG)
    (target / "checkpoint-5").mkdir()
    (target / "checkpoint-5" / "state").write_text("5")
    with replaced_folder(target, keep=["checkpoint-*"]) as folder:
        (folder / "model").write_text("2")
        assert contents(target)["model"] == "1"
    assert contents(target) == {"model": "2", "checkpoint-5/state": "5"}
    assert [entry.name for entry in target.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    target = tmp_path / "run"
    with replaced_folder(target) as folder:
        (folder / "config.json").write_text(CONFIG)
    with pytest.raises(error):
        write_half(target, error)
    assert contents(tmp_path) == {"run/config.json": CONFIG}
    with pytest.raises(error):
        write_half(tmp_path / "new", error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def write_half(target, error):
    with replaced_folder(target) as folder:
        (folder / "model").write_text("half")
        raise error


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "run").write_text("mine")
    with (
        pytest.raises(NotADirectoryError, match="is a file; expected a folder to replace"),
        replaced_folder(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def test_what_is_not_a_runs_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="holds files but no model, and would be replaced"),
        replaced_folder(tmp_path),
    ):
        pass
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for path in (".", "..", tmp_path):
        with pytest.raises(FileExistsError, match="holds the working folder"), replaced_folder(path):
            pass
    assert contents(tmp_path) == {"thesis.txt": "mine"}


@pytest.mark.parametrize("sign", ["runs/events", "checkpoint-1/state", "config.json"])
def test_a_project_that_looks_like_a_run_is_not_replaced(tmp_path, sign):
    target = tmp_path / "project"
    for name, text in ((sign, "{}"), ("thesis.tex", "mine")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    with (
        pytest.raises(FileExistsError, match="holds files but no model"),
        replaced_folder(target, keep=("runs", "checkpoint-*")),
    ):
        pass
    assert contents(target) == {sign: "{}", "thesis.tex": "mine"}


def test_a_path_below_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PermissionError, match="is no folder that can be written to"):
        check_replaceable(tmp_path / "file" / "a" / "run")


def test_the_last_checkpoint_that_was_written_to_its_end(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    states = {300: '{"global_step": 300}', 9: "{}", 20: '{"global_step": 20}', 100: '{"global', 200: None}
    for age, (step, state) in enumerate(states.items()):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            file = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
            file.write_text(state)
            os.utime(file, (age, age))  # the first is another run's, which had got further
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def run_of_before(target):
    target.mkdir()
    (target / "config.json").write_text(CONFIG)
    (target / "checkpoint-5").mkdir()
    (target / "checkpoint-5" / "state").write_text("5")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupt_between_two_renames_loses_nothing(tmp_path, monkeypatch, call):
    """After each rename in turn: there is the old model or the new one, with the checkpoints, and nothing else."""
    target = tmp_path / "run"
    run_of_before(target)
    rename, calls = Path.rename, []

    def interrupted(self, other):
        found = rename(self, other)
        calls.append(other)
        if len(calls) == call:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(target, keep=["checkpoint-*"]) as folder:
        (folder / "config.json").write_text("new")
    expected = CONFIG if call == 1 else "new"
    assert contents(tmp_path) == {"run/config.json": expected, "run/checkpoint-5/state": "5"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


KILLED = """
import os, sys
from pathlib import Path
from hf_scan.training.output_dirs import replaced_folder

rename, calls = Path.rename, []

def killed(self, other):
    rename(self, other)
    calls.append(other)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

Path.rename = killed
with replaced_folder(sys.argv[1], keep=["checkpoint-*"]) as folder:
    (folder / "config.json").write_text('{"model_type": "scan", "new": 1}')
    if sys.argv[2] == "0":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("call", [0, 1, 2])
def test_the_next_run_mends_what_a_killed_one_left(tmp_path, call):
    target = tmp_path / "run"
    run_of_before(target)
    assert subprocess.run([sys.executable, "-c", KILLED, str(target), str(call)], timeout=240).returncode == -9
    assert len(list(tmp_path.iterdir())) > int(call != 1)
    with lock_output_folder(target, keep=["checkpoint-*"]):
        found = contents(target)
    assert found["checkpoint-5/state"] == "5"
    assert ("new" in found["config.json"]) == (call == 2)
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["run"]


def test_a_disk_that_is_full_at_the_end(tmp_path):
    """What was there stays, and the error says from where to go on."""
    target = tmp_path / "run"
    run_of_before(target)
    (target / "checkpoint-5/trainer_state.json").write_text('{"global_step": 5}')
    before = contents(target)

    def fill():
        with replaced_folder(target, keep=["checkpoint-*"]) as folder:
            (folder / "metrics.json").symlink_to("/dev/full")
            (folder / "metrics.json").write_text("{}")

    with pytest.raises(OSError, match=r"run could not be written: the disk is full, .* resume the run from .*point-5"):
        fill()
    assert contents(target) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_two_runs_on_one_folder(tmp_path):
    target = tmp_path / "run"
    lock = lock_output_folder(target)
    with pytest.raises(FileExistsError, match=r"Another run writes to .*run, and one of the two would be lost"):
        lock_output_folder(target)
    lock_output_folder(tmp_path / "run-2").release()
    lock.release()
    lock_output_folder(target).release()


def test_folders_of_others_are_left_alone(tmp_path):
    for name in (".run-12345678", ".run-other", ".run-2-12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    lock_output_folder(tmp_path / "run").release()
    assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 3
