"""Saves that are killed, fail or are read meanwhile: the old checkpoint or the new one, and no mixture."""

import threading
import time

import pytest
from safetensors import SafetensorError

from hf_scan import ExitConfig
from hf_scan.model import staged_folder

from ..conftest import random_scan_model
from ..killed_processes import killed_before
from .samples import load, saved


def kinds_of_answers(folder, models) -> tuple[int | None, int | None]:
    """Which model the weights of a folder are of, and which the thresholds."""
    found = load(folder)
    weights = [index for index, model in enumerate(models) if model.fingerprint() == found.fingerprint()]
    rules = [index for index, model in enumerate(models) if model.exit_config == found.exit_config]
    return (weights[0] if weights else None), (rules[0] if rules else None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("5GB", "200KB"),
        ("200KB", "5GB"),
        pytest.param("5GB", "5GB", marks=pytest.mark.slow),
        pytest.param("200KB", "300KB", marks=pytest.mark.slow),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path, before, after, monkeypatch):
    """Killed before each of the calls by which it changes a folder."""
    monkeypatch.setattr(staged_folder, "IDLE_AFTER", 0)
    new = saved(tmp_path / "new", seed=1, thresholds=ExitConfig(thresholds=[0.1, 0.2]))
    seen, at = set(), 0
    while True:
        old = saved(tmp_path / str(at), max_shard_size=before)
        finished = killed_save(new, tmp_path / str(at), at, max_shard_size=after)
        weights, rule = kinds_of_answers(tmp_path / str(at), [old, new])
        assert weights == rule
        assert weights is not None
        seen.add(weights)
        if finished:
            break
        at += 1
    assert at > 3
    assert seen == {0, 1}
    assert not list((tmp_path / str(at)).glob(".sav*"))


def killed_save(model, target, at: int, **kwargs) -> bool:
    """Save in a process that is killed before the call of that number that changes a folder; whether it was not."""
    return not killed_before(at, lambda: model.save_pretrained(target, **kwargs))


def test_what_a_killed_save_leaves_is_removed_later(tmp_path, monkeypatch):
    model = saved(tmp_path)
    assert not killed_save(model, tmp_path, at=2)
    assert len(list(tmp_path.glob(".saving-*"))) == 1
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob(".saving-*"))) == 1  # it could be another process's, at work
    monkeypatch.setattr(staged_folder, "ABANDONED_AFTER", -1)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".saving-*"))


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = random_scan_model(1)

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match=r"could not be written to .*No space left.*has not changed\. Make room"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_sees_the_old_or_the_new_checkpoint(tmp_path):
    """While another thread saves two of them in turn, of other weights, thresholds, labels and files."""
    models = []
    for seed, shards in ((0, "5GB"), (1, "200KB")):
        model = random_scan_model(seed)
        model.exit_config = ExitConfig(thresholds=[0.1 + seed / 2] * 2)
        model.config.id2label = {index: f"{seed}-{index}" for index in range(5)}
        models.append((model, shards))
    models[0][0].save_pretrained(tmp_path)
    start = time.perf_counter()
    load(tmp_path)
    pause = max(0.1, 3 * (time.perf_counter() - start))  # a busy machine loads slowly, and only five times
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for model, shards in models:
                model.save_pretrained(tmp_path, max_shard_size=shards)
                time.sleep(pause)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        for _ in range(40):
            found = load(tmp_path)
            kind = int(found.config.id2label[0].split("-")[0])
            assert found.fingerprint() == models[kind][0].fingerprint()
            assert found.exit_config == models[kind][0].exit_config
            seen.add(kind)
    finally:
        done.set()
        writer.join()
    assert seen == {0, 1}
