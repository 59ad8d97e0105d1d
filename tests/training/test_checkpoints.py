import copy
import json
from concurrent.futures import Future

import pytest
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_scan import (
    EmaCallback,
    ExitConfig,
    RiskBound,
    ScanForImageClassification,
    ScanTrainer,
    calibrate,
    certify_thresholds,
)
from hf_scan.data import some_digests
from hf_scan.model.provenance import known_parts, unknown_parts
from hf_scan.training.baseline import plain_copy
from hf_scan.training.checkpoints import CheckedTrainer
from hf_scan.training.stage_features import extract_stage_features

from ..conftest import random_scan_model
from .samples import arguments, fresh_model, rows


def train(model, images, folder, **settings) -> ScanForImageClassification:
    ScanTrainer(model, arguments(folder, **{"max_steps": 1, **settings}), train_dataset=images).train()
    return model


def refuses(model, images) -> None:
    with pytest.raises(ValueError, match="was trained on the 'search' split, or a part of it"):
        calibrate(model, images, max_accuracy_drop=1.0)


FIRST, SECOND, OTHERS = rows(40), rows(40, seed=1), rows(40, seed=2)


def test_weights_that_were_trained_twice_keep_both_splits(tmp_path):
    """Through a save, a load, a second training, a truncation, another rule and a copy."""
    model = train(random_scan_model(), FIRST, tmp_path)
    model.save_pretrained(tmp_path / "first")
    model = train(ScanForImageClassification.from_pretrained(tmp_path / "first"), SECOND, tmp_path)
    assert known_parts(model.exit_config.trained_on) == [some_digests(FIRST), some_digests(SECOND)]
    model.save_pretrained(tmp_path / "second")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    loaded.exit_config = ExitConfig(thresholds=[0.5, 0.5])
    truncated = loaded.truncate(exit=0)
    for network in (loaded, copy.deepcopy(loaded)):
        for images in (FIRST, SECOND):
            refuses(network, images)
            with pytest.raises(ValueError, match="was trained on the 'certify' split"):
                certify_thresholds(network, images, RiskBound(50.0))
    assert truncated.exit_config.trained_on == loaded.exit_config.trained_on
    assert calibrate(loaded, OTHERS, max_accuracy_drop=1.0).trained_on == loaded.exit_config.trained_on


def test_a_model_made_anew_remembers_what_it_is_trained_on(tmp_path):
    args = arguments(tmp_path, max_steps=1)
    trainer = ScanTrainer(args=args, model_init=fresh_model, train_dataset=FIRST)
    trainer.train()
    assert trainer.model.exit_config.trained_on == some_digests(FIRST)


def test_heads_that_are_trained_on_stored_features_remember_the_images(tmp_path):
    model = random_scan_model()
    features = extract_stage_features(model, FIRST, tmp_path / "features")
    refuses(train(model, features, tmp_path / "run", freeze_backbone=True), FIRST)
    assert model.exit_config.trained_on == some_digests(FIRST)


def test_parts_and_sums_of_datasets_are_known_by_their_images(tmp_path):
    both = ConcatDataset([Subset(FIRST, range(20)), SECOND])
    assert some_digests(both) == some_digests([*FIRST[:20], *SECOND])
    assert some_digests(Subset(both, [1, 30])) == some_digests([FIRST[1], SECOND[10]])
    refuses(train(random_scan_model(), both, tmp_path), FIRST[:20])


def test_images_that_cannot_be_known_are_said_to_be_so(tmp_path, caplog):
    class Stream:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return FIRST[index]

    model = train(random_scan_model(), FIRST, tmp_path)
    train(model, Stream(), tmp_path)
    assert unknown_parts(model.exit_config.trained_on) == ["8 images of a Stream"]
    refuses(model, FIRST)  # still
    backbone = random_scan_model().backbone
    theirs = ScanForImageClassification.from_timm(backbone, image_size=16).eval()
    assert unknown_parts(theirs.exit_config.trained_on) == ["weights of cifar_resnet20"]
    known = ScanForImageClassification.from_timm(backbone, image_size=16, trained_on=some_digests(FIRST)).eval()
    refuses(known, FIRST)
    fresh = random_scan_model()  # or one whose weights came as a state dict
    for network, warned in ((theirs, True), (model, True), (known, False), (fresh, True)):
        assert ("trained on images that cannot be known" in warnings_of_calibration(network, caplog)) == warned


def warnings_of_calibration(network, caplog) -> str:
    caplog.clear()
    with caplog.at_level("WARNING"):
        logging.enable_propagation()
        calibrate(network, OTHERS, max_accuracy_drop=1.0)
        logging.disable_propagation()
    return caplog.text


def test_a_training_loop_that_records_nothing_is_said_to_be_one(tmp_path, caplog):
    """After one that does; a forward pass alone, or one of ScanTrainer, is none."""
    model = train(random_scan_model(), FIRST, tmp_path)
    pixels = FIRST[0]["pixel_values"][None]
    model.train()(pixels.expand(2, -1, -1, -1), labels=torch.tensor([0, 1]))
    assert unknown_parts(model.exit_config.trained_on) == []
    assert "cannot be known" not in warnings_of_calibration(model.eval(), caplog)
    args = TrainingArguments(str(tmp_path / "plain"), max_steps=2, save_steps=2, use_cpu=True, report_to=[])
    Trainer(model, args, train_dataset=SECOND).train()
    loaded = ScanForImageClassification.from_pretrained(tmp_path / "plain/checkpoint-2")
    for network in (model.eval(), loaded):
        assert known_parts(network.exit_config.trained_on) == [some_digests(FIRST)]
        assert unknown_parts(network.exit_config.trained_on) == [
            "images of a training loop other than ScanTrainer, which keeps no record"
        ]
        assert "(images of a training loop other than ScanTrainer" in warnings_of_calibration(network, caplog)


@pytest.mark.parametrize("given", [ExitConfig(), {"thresholds": [0.5, 0.5]}, "fast.json"], ids=["no", "dict", "file"])
def test_another_rule_at_loading_keeps_what_weights_were_trained_on(tmp_path, given):
    model = train(random_scan_model(), FIRST, tmp_path / "run")
    model.save_pretrained(tmp_path / "saved")
    ExitConfig(thresholds=[0.5, 0.5]).save_pretrained(tmp_path / "saved", "fast.json")
    loaded = ScanForImageClassification.from_pretrained(tmp_path / "saved", exit_config=given)
    assert (loaded.exit_config.thresholds is None) == (given == ExitConfig())
    refuses(loaded, FIRST)


def test_an_exit_configuration_that_cannot_be_read_beside_another_rule(tmp_path):
    random_scan_model().save_pretrained(tmp_path)
    (tmp_path / "exit_config.json").write_text("{")
    loaded = ScanForImageClassification.from_pretrained(tmp_path, exit_config=ExitConfig(thresholds=[0.5, 0.5]))
    assert unknown_parts(loaded.exit_config.trained_on) == ["weights whose exit_config.json cannot be read"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The second of four steps, and where the run ended."""
    folder = tmp_path_factory.mktemp("run")
    model = train(random_scan_model(), FIRST, folder, max_steps=4, save_strategy="steps", save_steps=2)
    return folder / "checkpoint-2", model.fingerprint()


def resume(checkpoint, folder, images=FIRST, **settings) -> ScanForImageClassification:
    model = random_scan_model(seed=1)
    args = arguments(folder, max_steps=4, **settings)
    ScanTrainer(model, args, train_dataset=images).train(resume_from_checkpoint=str(checkpoint))
    return model


def copied(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_resumed_run_ends_as_the_whole_one_and_remembers_its_images_once(checkpoint, tmp_path):
    folder, fingerprint = checkpoint
    again = copied(folder, tmp_path)
    ExitConfig(trained_on=some_digests(FIRST), thresholds=[0.5, 0.5]).save_pretrained(again)  # what is no part of it
    model = resume(again, tmp_path / "run")
    assert model.fingerprint() == fingerprint
    assert model.exit_config.trained_on == some_digests(FIRST)


@pytest.mark.parametrize("end", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1.25}])
def test_a_run_that_was_killed_behind_its_last_step_trains_no_further(tmp_path, end):
    """Which does not end an epoch: there are two steps in one."""
    kept = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 20, **end}
    whole = train(random_scan_model(), FIRST, tmp_path, **kept)
    model = random_scan_model(1)
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5])
    trainer = ScanTrainer(model, arguments(tmp_path, **kept), train_dataset=FIRST)
    assert trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).global_step == 3
    assert model.fingerprint() == whole.fingerprint()
    assert (model.exit_config.thresholds, model.exit_config.trained_on) == (None, some_digests(FIRST))
    assert not (tmp_path / "checkpoint-4").exists()
    longer = {**kept, "max_steps": 4}
    resumed = ScanTrainer(random_scan_model(), arguments(tmp_path, **longer), train_dataset=FIRST)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).global_step == 4


@pytest.mark.parametrize(
    ("images", "settings", "what"),
    [
        (SECOND, {}, "train images"),
        (FIRST[:30], {}, "train images"),  # another holdout
        (FIRST, {"seed": 7}, "`seed`: 42 instead of 7"),
        (FIRST, {"data_seed": 7}, "`data_seed`: None instead of 7"),
    ],
)
def test_a_resume_with_other_images_is_refused(checkpoint, tmp_path, images, settings, what):
    with pytest.raises(ValueError, match=rf"checkpoint-2 is of a run with other {what}.*load them with"):
        resume(checkpoint[0], tmp_path, images, **settings)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("record", [True, False])
def test_a_checkpoint_without_one_of_its_parts_is_refused(checkpoint, tmp_path, name, record):
    """One of an earlier version too, which has no record."""
    folder = copied(checkpoint[0], tmp_path)
    (folder / name).unlink()
    if not record:
        (folder / "checkpoint.json").unlink()
    with pytest.raises((OSError, ValueError), match=rf"has no .{name[:9]}|{name}. of the checkpoint|valid checkpoint"):
        resume(folder, tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_flipped_byte_is_found(checkpoint, tmp_path, name):
    folder = copied(checkpoint[0], tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=rf"'{name}' of the checkpoint .* has changed since it was written"):
        resume(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.pt", r"optimizer\.pt or scheduler\.pt of the checkpoint"),
        ("scheduler.pt", r"optimizer\.pt or scheduler\.pt of the checkpoint"),
        ("rng_state.pth", r"rng_state\.pth of the checkpoint"),
        ("model.safetensors", "weights of the checkpoint"),
        ("trainer_state.json", r"'trainer_state\.json' of the checkpoint"),
    ],
)
def test_a_damaged_part_is_named_where_there_is_no_record(checkpoint, tmp_path, name, said):
    """As of a checkpoint that a plain `Trainer` wrote."""
    folder = copied(checkpoint[0], tmp_path)
    (folder / "checkpoint.json").unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(OSError, match=rf"{said} .*checkpoint-2 cannot be (loaded|read) \(.+\).*another checkpoint"):
        resume(folder, tmp_path / "run")


def test_a_damaged_record_is_named(checkpoint, tmp_path):
    folder = copied(checkpoint[0], tmp_path)
    for text in ("{", '{"files": 3}', "[]"):
        (folder / "checkpoint.json").write_text(text)
        with pytest.raises(OSError, match=r"checkpoint\.json cannot be read"):
            resume(folder, tmp_path / "run")


def test_the_last_checkpoint_of_a_folder(tmp_path):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="holds no checkpoint that was written to its end"):
        ScanTrainer(random_scan_model(), args, train_dataset=FIRST).train(resume_from_checkpoint=True)
    ScanTrainer(random_scan_model(), args, train_dataset=FIRST).train()
    (tmp_path / "checkpoint-9").mkdir()  # which a kill left
    args.max_steps = 3
    trainer = ScanTrainer(random_scan_model(), args, train_dataset=FIRST)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_plain_backbone_is_checked_and_its_images_are_remembered(tmp_path):
    plain = plain_copy(random_scan_model())
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = CheckedTrainer(plain, args, train_dataset=FIRST)
    trainer.train()
    record = json.loads((tmp_path / "checkpoint-1" / "checkpoint.json").read_text())
    assert record["trained_on"] == some_digests(FIRST)
    assert isinstance(trainer.model, TimmWrapperForImageClassification)
    with pytest.raises(ValueError, match="is of a run with other train images"):
        CheckedTrainer(plain, args, train_dataset=SECOND).train(str(tmp_path / "checkpoint-1"))


def test_stored_images_are_known_in_parts(tmp_path):
    stored = Dataset.from_dict({"x": list(range(10))})
    assert some_digests(Subset(stored, [2, 3])) == some_digests(stored.select([2, 3]))


@pytest.mark.parametrize("name", ["checkpoint.json", "optimizer.pt"])
def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, name):
    """Of a plain network's run too: what was half written goes, what was whole stays."""
    plain = plain_copy(random_scan_model())
    args = arguments(tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer = CheckedTrainer(plain, args, train_dataset=FIRST, callbacks=[EmaCallback()])
    (tmp_path / "run/checkpoint-4").mkdir(parents=True)
    (tmp_path / "run/checkpoint-4" / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .* resumed from .*checkpoint-2\."):
        trainer.train()
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_a_full_disk_when_the_model_is_saved(tmp_path):
    trainer = ScanTrainer(random_scan_model(), arguments(tmp_path / "run"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/preprocessor_config.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"saved could not be written: the disk is full, .* Make space there"):
        trainer.save_model(tmp_path / "saved")


def test_checkpoints_that_do_not_fit_on_the_disk(tmp_path):
    """A million of them; one or two at a time do."""
    settings = {"max_steps": 10**9, "save_strategy": "steps", "save_steps": 1}
    model = random_scan_model()
    with pytest.raises(OSError, match=r"The 1000000000 checkpoints that are kept of this run take \d+\.\d GB, and"):
        ScanTrainer(model, arguments(tmp_path / "run", **settings), train_dataset=FIRST).train()
    assert not (tmp_path / "run/checkpoint-1").exists()
    for fewer in ({"save_total_limit": 1}, {"save_steps": 10**9}, {"save_strategy": "no"}):
        trainer = ScanTrainer(model, arguments(tmp_path / "run", **{**settings, **fewer}), train_dataset=FIRST)
        trainer._check_space()


def test_a_push_in_the_background_that_fails_is_named(tmp_path, monkeypatch, caplog):
    """Trainer drops what it ends with. Each is named once, also where a later one is added to those that wait."""
    jobs = [Future(), Future()]

    def push(trainer, folder):
        trainer.push_in_progress = PushInProgress(jobs[: int(folder)])

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = ScanTrainer(random_scan_model(), arguments(tmp_path, hub_model_id="alice/net"))
    trainer._push_from_checkpoint("1")
    trainer._push_from_checkpoint("2")
    with caplog.at_level("WARNING"):
        logging.enable_propagation()
        jobs[0].set_exception(ConnectionError("no route to host"))
        jobs[1].set_result(None)
        logging.disable_propagation()
    assert (
        caplog.text.count("alice/net could not be pushed to (ConnectionError: no route to host). Check the name") == 1
    )
    assert "Training goes on." in caplog.text
    assert len(caplog.records) == 1
