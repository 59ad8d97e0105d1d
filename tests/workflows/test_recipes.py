from pathlib import Path

import pytest

from hf_scan.workflows.recipes import HEADS_RECIPE, RECIPES, parse_arguments, read_recipe
from hf_scan.workflows.train_run import run_training


def parsed(tmp_path, *flags):
    given = ["--dataset_name", "photos", "--output_dir", str(tmp_path), "--use_cpu"]
    return parse_arguments([*given, *flags])


def test_fresh_heads_have_defaults_of_their_own(tmp_path):
    """Transformers' are for fine-tuning. Flags and recipes win."""
    _, _, args = parsed(tmp_path)
    assert args.learning_rate == 5e-5
    _, _, args = parsed(tmp_path, "--freeze_backbone")
    assert {name: getattr(args, name) for name in HEADS_RECIPE} == HEADS_RECIPE
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("freeze_backbone: true\nlearning_rate: 0.5\ndataset_name: photos\n")
    _, _, args = parse_arguments([str(recipe), "--output_dir", str(tmp_path), "--use_cpu", "--weight_decay", "0.7"])
    assert (args.learning_rate, args.weight_decay) == (0.5, 0.7)
    assert args.num_train_epochs == HEADS_RECIPE["num_train_epochs"]


def test_recipes_of_the_package_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("cifar100_resnet18.yaml")) == read_recipe(RECIPES / "cifar100_resnet18.yaml")
    Path("digits.yaml").write_text("seed: 7\n")
    assert read_recipe(Path("digits.yaml")) == {"seed": 7}  # a file of one's own comes first
    with pytest.raises(FileNotFoundError, match=r"no recipe none.yaml; expected .*, or one of cifar100.yaml, "):
        read_recipe(Path("none.yaml"))
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        read_recipe(Path("elsewhere/cifar100.yaml"))


def test_targets_are_those_of_calibrate(tmp_path):
    _, network, _ = parsed(tmp_path)
    assert network.target(seed=3) == {"beta": 0.5, "seed": 3}
    _, network, _ = parsed(tmp_path, "--max_accuracy_drop", "0.5", "--guarantee", "1.0", "--import", "json")
    target = network.target(seed=3)
    assert target["max_accuracy_drop"] == 0.5
    assert (target["guarantee"].max_drop, target["guarantee"].delta) == (1.0, 0.05)
    assert network.import_module == "json"


def test_targets_need_images(tmp_path):
    for flags, message in (
        (["--max_accuracy_drop", "1", "--holdout", "0"], "need images to search thresholds on"),
        (["--guarantee", "-1"], "`max_drop` is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_training(*parsed(tmp_path, *flags))
