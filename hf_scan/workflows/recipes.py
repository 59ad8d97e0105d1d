# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Flags of a training run, from the command line and from recipes: YAML files of flags."""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..training.training_args import ScanTrainingArguments
from .data_arguments import DataArguments
from .model_arguments import ModelArguments


# The recipes that come with the package, which are named without a folder.
RECIPES = Path(__file__).parent.parent / "recipes"
# How fresh heads are trained on a frozen backbone, unless flags say otherwise: Transformers' defaults are for
# fine-tuning, at a hundredth of the learning rate that weights need which start from random numbers.
HEADS_RECIPE: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "label_smoothing_factor": 0.1,
}


def parse_arguments(
    arguments: list[str], description: str | None = None, prog: str | None = None
) -> tuple[DataArguments, ModelArguments, ScanTrainingArguments]:
    """
    Parse the flags of a training run, after a recipe or without one. Flags win over the recipe, and the recipe over
    the defaults for heads of a frozen backbone ([`HEADS_RECIPE`]).

    Args:
        arguments (`list[str]`): What stands on the command line.
        description (`str`, *optional*): What `--help` says first.
        prog (`str`, *optional*): What `--help` calls the program.
    """
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        flags: list[str] = []
        for name, value in read_recipe(Path(arguments[0])).items():
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
        arguments = [*flags, *arguments[1:]]
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, ScanTrainingArguments), description=description, prog=prog, allow_abbrev=False
    )
    data, network, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if args.freeze_backbone:
        defaults = [part for name, value in HEADS_RECIPE.items() for part in (f"--{name}", str(value))]
        data, network, args = parser.parse_args_into_dataclasses([*defaults, *arguments], look_for_args_file=False)
    return data, network, args


def read_recipe(path: Path) -> dict[str, Any]:
    """
    Return the flags of a recipe, and of one beside it that it includes.

    Args:
        path (`Path`): A YAML file of flags or, where there is none at a path without a folder, the name of a recipe of
            the package, such as `cifar100.yaml`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it holds anything else than flags.
    """
    if not path.is_file() and path == Path(path.name) and (RECIPES / path).is_file():
        path = RECIPES / path
    if not path.is_file():
        known = ", ".join(sorted(found.name for found in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"There is no recipe {path}; expected a YAML file of flags, or one of {known}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The recipe {path} cannot be read as YAML ({' '.join(str(error).split())}); expected a line "
            "`flag: value` each."
        ) from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} holds a {type(recipe).__name__}; expected a line `flag: value` each.")
    included = recipe.pop("include", None)
    return {**read_recipe(path.parent / included), **recipe} if included else recipe


__all__ = ["HEADS_RECIPE", "RECIPES", "parse_arguments", "read_recipe"]
