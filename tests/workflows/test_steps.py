import pytest

from hf_scan.workflows.steps import Steps


def run_all(folder, calls, second="b", fails=False):
    """Two steps; the second leaves something before it fails."""

    def work(name):
        def done():
            calls.append(name)
            (folder / "second").mkdir(exist_ok=True)
            if name == "second":
                calls.append(sorted(path.name for path in (folder / "second").iterdir()))
                (folder / "second" / "left").write_text("")
                if fails:
                    raise KeyboardInterrupt
            return {"made": name}

        return done

    steps = Steps(folder, 2)
    first = steps.run("first", "First", {"a": [1, 2]}, work("first"))
    return first, steps.run("second", "Second", {"b": second}, work("second"))


def test_a_finished_step_is_not_repeated_and_an_interrupted_one_goes_on(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, calls, fails=True)
    assert calls == ["first", "second", []]
    assert run_all(tmp_path, calls) == ({"made": "first"}, {"made": "second"})
    assert calls[3:] == ["second", ["left"]]
    assert run_all(tmp_path, calls) == ({"made": "first"}, {"made": "second"})
    assert len(calls) == 5


def test_a_step_with_other_settings_starts_anew(tmp_path):
    calls = []
    run_all(tmp_path, calls)
    run_all(tmp_path, calls, second="c")
    assert calls[3:] == ["second", []]  # what it left was of other settings
    steps = Steps(tmp_path, 1)
    steps.run("first", "First", {"a": [1]}, lambda: {})
    again = []
    steps.run("second", "Second", {"b": "c"}, lambda: again.append(1) or {})
    assert again == [1]  # it depends on the first


def test_a_damaged_record_is_none(tmp_path):
    run_all(tmp_path, [])
    (tmp_path / "second.json").write_text('{"settings"')
    calls = []
    run_all(tmp_path, calls)
    assert calls[0] == "second"


def test_a_step_whose_work_is_gone_is_done_again(tmp_path):
    made, calls = tmp_path / "made.txt", []

    def work():
        calls.append(made.write_text("here"))
        return {}

    for _ in range(2):
        Steps(tmp_path, 1).run("first", "First", {}, work, made)
    assert len(calls) == 1
    made.unlink()
    Steps(tmp_path, 1).run("first", "First", {}, work, made)
    assert len(calls) == 2
    assert made.exists()
