"""The estimate of a run's time, and its corrections."""

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.workflows.equip_arguments import EquipArguments
from hf_scan.workflows.steps import Steps
from hf_scan.workflows.time_left import TimeLeft, TrainingProgress, expected_seconds, seconds_of_an_image


def test_what_steps_took_corrects_the_rest():
    left = TimeLeft({"a": 100.0, "b": 200.0, "c": 300.0})
    assert left.seconds() == 600.0
    left.finish("a", 200.0)
    rate = (30 + 200) / (30 + 100)
    assert left.seconds() == rate * 500
    # Half of the next one, as fast as expected.
    rate = (30 + 200 + 100) / (30 + 100 + 100)
    assert left.seconds("b", 0.5, 100.0) == rate * 400
    left.skip("c")
    assert left.seconds() == (30 + 200) / (30 + 100) * 200
    left.skip("b")
    assert (left.seconds(), left.text()) == (0.0, "about 1 minute")


def test_a_first_estimate_that_is_far_off_hardly_counts_after_a_while():
    left = TimeLeft({"search": 60.0, "train": 600.0})
    assert 8 * 600 < left.seconds("search", 1.0, 1000.0) < 12 * 600


def test_what_a_run_is_expected_to_take():
    arguments = EquipArguments(model="", data="", output="", search_epochs=4, epochs=10)
    counts = {"train": 1000, "search": 200, "test": 400}
    seconds = expected_seconds(arguments, counts, 0.1, new_classes=True)
    assert list(seconds) == ["plain", "search", "joint", "train", "costs", "finish"]
    assert [round(value) for value in seconds.values()] == [50, 440, 3000, 700, 30, 60]
    assert expected_seconds(arguments, counts, 0.1, new_classes=False)["plain"] == 5.0


def test_an_image_is_timed_without_changing_weights():
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
    before = {name: value.clone() for name, value in model.named_parameters()}

    class Images(list):
        def __getitems__(self, rows):
            return [self[row] for row in rows]

    images = Images({"pixel_values": torch.rand(3, 32, 32), "labels": 0} for _ in range(3))  # fewer than a batch
    assert seconds_of_an_image(model, images) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training_recorded


def test_a_training_that_goes_on_counts_what_is_left_of_it(tmp_path, capsys):
    left = TimeLeft({"train": 400.0, "rest": 0.0})
    progress, control = TrainingProgress(left, "train"), TrainerControl()
    args = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=4, report_to="none")
    state = TrainerState(global_step=50, max_steps=200, epoch=1.0)
    progress.on_train_begin(args, state, control)
    assert left.expected["train"] == 300.0
    state.global_step, state.epoch = 100, 2.0
    progress.start -= 200  # a third of what is left took twice as long as expected
    progress.on_log(args, state, control, {"loss": "1.5"})
    progress.on_log(args, state, control, {"train_runtime": 3})  # of the end, which is nothing new
    progress.on_train_end()
    assert capsys.readouterr().out == "      epoch 2 of 4: loss 1.500, about 6 minutes left in all\n"


def test_steps_print_the_time_that_is_left(tmp_path, capsys):
    seconds = {"first": 60.0, "second": 300.0}
    steps = Steps(tmp_path, 2, TimeLeft(seconds))
    for name in seconds:  # which take no time at all
        steps.run(name, f"Do the {name}", {}, dict)
    again = Steps(tmp_path, 2, TimeLeft(seconds))
    again.run("first", "Do the first", {}, dict)
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] Do the first (about 6 minutes left)",
        "[2/2] Do the second (about 2 minutes left)",
        "[1/2] Do the first: done before",
    ]
    assert again.left.seconds() == 300.0
