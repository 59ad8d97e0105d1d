import os

import pytest

from hf_scan.training.output_dirs import check_replaceable, last_whole_checkpoint, replaced_folder


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
