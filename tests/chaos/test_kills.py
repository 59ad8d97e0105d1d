"""SIGKILL at random moments of training and of saving."""

import itertools
import time
from collections import Counter
from functools import partial

import pytest

from hf_scan import ExitConfig, ScanForImageClassification, ScanTrainer
from hf_scan.training.output_dirs import last_whole_checkpoint, lock_output_folder, replaced_folder

from ..conftest import random_scan_model
from ..training.samples import arguments, rows
from .processes import RANDOM, SEED, finish, kill_after, start


KEPT = ("checkpoint-*",)
ROUNDS = 15  # of each kind
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def run(folder) -> None:
    """A run from its arguments to a finished folder, or the rest of one that was killed."""
    with lock_output_folder(folder, KEPT):
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
        trainer = ScanTrainer(random_scan_model(), arguments(folder, **settings), train_dataset=rows(40))
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        trainer.model.exit_config = ExitConfig(thresholds=[0.5, 0.5])
        for _ in range(2):  # once before and once after what follows a training
            with replaced_folder(folder, KEPT) as new:
                trainer.model.save_pretrained(new)


def test_training_is_killed(tmp_path):
    """Whatever the moment, a folder that holds a model holds the whole one, and the run can be finished."""
    log = tmp_path / "log"
    begin = time.monotonic()
    finish(start(partial(run, tmp_path / "whole"), log), log)
    seconds = time.monotonic() - begin
    expected = ScanForImageClassification.from_pretrained(tmp_path / "whole")
    seen: Counter[str] = Counter()
    for number in range(ROUNDS):
        folder = tmp_path / f"run{number}"
        kills = 0
        for moment in (RANDOM.uniform(0, 1.1 * seconds), RANDOM.uniform(0, 0.5 * seconds)):
            kills += kill_after(start(partial(run, folder), log), moment, log)
            left = sorted(path.name for path in folder.glob("checkpoint-*"))
            if (folder / "config.json").is_file():
                loaded = ScanForImageClassification.from_pretrained(folder)
                assert loaded.fingerprint() == expected.fingerprint()
                assert loaded.exit_config == expected.exit_config
        finish(start(partial(run, folder), log), log)
        loaded = ScanForImageClassification.from_pretrained(folder)
        assert loaded.fingerprint() == expected.fingerprint(), f"seed {SEED}, round {number}, left {left}"
        assert loaded.exit_config == expected.exit_config
        assert not [path for path in tmp_path.glob(f".run{number}-*") if path.is_dir()]
        seen[f"killed {kills} times"] += 1
    print(f"\nSIGKILL while training, seed {SEED}: {ROUNDS} rounds, {dict(seen)}; all ended as the whole run did.")
    assert seen["killed 1 times"] + seen["killed 2 times"] > 0


def test_saving_is_killed(tmp_path, monkeypatch):
    """Whatever the moment, weights and thresholds are the old or the new ones."""
    models = []
    for seed in (0, 1):
        model = random_scan_model(seed)
        model.exit_config = ExitConfig(thresholds=[0.1 + seed / 2] * 2)
        models.append(model)

    def save_in_turn(folder) -> None:
        for number in itertools.count():
            models[number % 2].save_pretrained(folder, max_shard_size=("5GB", "200KB", "300KB")[number % 3])

    log, seen = tmp_path / "log", Counter()
    for number in range(ROUNDS):
        folder = tmp_path / f"model{number}"
        models[0].save_pretrained(folder)
        assert kill_after(start(partial(save_in_turn, folder), log), RANDOM.uniform(0, 1.5), log)
        halfway = "written" if list(folder.glob(".saving-*")) else "moved" if list(folder.glob(".saved-*")) else "none"
        loaded = ScanForImageClassification.from_pretrained(folder)
        kind = [model.fingerprint() for model in models].index(loaded.fingerprint())
        assert loaded.exit_config == models[kind].exit_config, f"seed {SEED}, round {number}"
        seen[f"files being {halfway}"] += 1
    print(f"\nSIGKILL while saving, seed {SEED}: {ROUNDS} rounds, {dict(seen)}; all loaded as one of the two models.")
