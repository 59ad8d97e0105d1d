# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Where a trained network's exits should stand, before any long training."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from ..calibration.exit_table import ExitTable, collect_exit_logits
from ..calibration.splits import LEAST_SAMPLES, check_unseen
from ..data.digests import some_digests
from ..model.configuration_scan import ScanConfig
from ..model.modeling_scan import ScanForImageClassification
from ..model.named_errors import write_whole
from ..reporting.plotting import plot_placement
from ..reporting.report import markdown_table
from ..training.output_dirs import last_whole_checkpoint
from ..training.trainer import ScanTrainer
from ..training.training_args import ScanTrainingArguments
from .candidates import candidates_of, keep_exits, left_out, network_of, with_candidates, with_exits
from .part_costs import PartCosts, costs_of_parts
from .placement import Problem, place_exits
from .recipes import HEADS_RECIPE
from .time_left import TrainingProgress
from .verdict import Verdict, verdict_of_search


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExitSearch:
    """
    What [`search_exits`] found.

    Args:
        config ([`ScanConfig`]): The network with the chosen exits, to be trained.
        rows (`list[dict[str, Any]]`): A row for each candidate: `name`, `cost` (of an answer there, as a share of the
            plain network's, its own head included), `head`, `accuracy`, `speedup` (with this exit alone at the
            target) and `chosen`.
        plain (`float`): The plain network's accuracy on the search images.
        deepest (`float`): That of the deepest exit, which is another where the network was trained with its exits.
        speedup (`float`): Expected of the chosen exits on other images, by cross-fitting, with heads trained as long
            as here: what exits bring at least.
        drop (`float`): Points lost against the plain network, in the same way.
        accuracy_margin (`float`): Points above the target for the accuracy that were kept on the search images, so
            that others reach it. Hand it on to [`calibrate`] if the same images find the trained network's thresholds.
        oracle (`float`): The most that the chosen exits could bring at that drop, if one knew which answers are right.
        unit (`str`): What costs were counted or measured in.
        verdict ([`~hf_scan.workflows.verdict.Verdict`]): Whether exits pay.
        model ([`ScanForImageClassification`]): The network with all candidates, whose heads have been trained.
        table ([`~hf_scan.calibration.ExitTable`]): What all candidates answer on the search images.
        dropped (`dict[str, str]`, *optional*): Modules that were not tried, with the reason.
    """

    config: ScanConfig
    rows: list[dict[str, Any]]
    plain: float
    deepest: float
    speedup: float
    drop: float
    accuracy_margin: float
    oracle: float
    unit: str
    verdict: Verdict
    model: ScanForImageClassification
    table: ExitTable
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def exit_points(self) -> list[str]:
        """The chosen exits, from shallow to deep."""
        return [row["name"] for row in self.rows if row["chosen"]]

    def create_model(self) -> ScanForImageClassification:
        """
        Return the network with the chosen exits, whose heads are trained as far as the search trained them.

        Raises:
            `ValueError`: if no exit was chosen.
        """
        if not self.exit_points:
            raise ValueError(f"No exit was chosen. {self.verdict}")
        return keep_exits(self.model, self.exit_points)

    def plot(self, path: str | Path) -> None:
        """Draw accuracy over depth and what each exit gains. Needs Matplotlib."""
        plot_placement(self.rows, self.plain, self.unit, path)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        names = ("rows", "plain", "deepest", "speedup", "drop", "accuracy_margin", "oracle", "unit", "dropped")
        return {
            **{name: getattr(self, name) for name in names},
            "exit_points": self.exit_points,
            "n": len(self.table),
            "verdict": self.verdict.to_dict(),
        }

    def __str__(self) -> str:
        head = ["exit", "cost", "head", "accuracy", "alone", "chosen"]
        lines = [
            [
                row["name"],
                f"{row['cost']:.3f}",
                f"{row['head']:.3f}",
                f"{row['accuracy']:.2%}",
                f"{row['speedup']:.2f}x",
                "yes" if row["chosen"] else "",
            ]
            for row in self.rows
        ]
        lines.append(["plain network", "1.000", "", f"{self.plain:.2%}", "", ""])
        if self.deepest != self.plain:
            lines.append(["deepest exit", "1.000", "", f"{self.deepest:.2%}", "", ""])
        return "\n".join(
            [
                markdown_table([head, *lines]),
                *left_out(self.dropped),
                f"On {len(self.table)} images; costs as shares of the plain network's: {self.unit}.",
                f"Expected on other images with the chosen exits: {self.speedup:.2f}x at {self.drop:+.2f} points of "
                f"drop; an oracle would reach {self.oracle:.2f}x.",
                str(self.verdict),
            ]
        )


def search_exits(
    model: ScanForImageClassification,
    dataset: Any,
    max_exits: int = 4,
    max_accuracy_drop: float = 0.5,
    *,
    exit_points: Sequence[str] | None = None,
    holdout: float = 0.2,
    num_epochs: float = 4,
    batch_size: int = 64,
    costs: str | PartCosts = "macs",
    output_dir: str | Path | None = None,
    seed: int = 0,
    **training_arguments: Any,
) -> ExitSearch:
    """
    Find where exits pay on a trained network, which stays as it is. Every block is a candidate. All candidates' heads
    are trained together on what the frozen network makes of the images, which are read once an epoch and not stored.
    Then the subset of exits is taken that costs least at the target, on held-out images.

    Args:
        model ([`ScanForImageClassification`]): The trained network, such as `from_timm` makes it. Its own early exits
            do not matter.
        dataset (`Mapping[str, Any]` or `datasets.Dataset`): Transformed images with labels: `train` and `search`, as
            [`~hf_scan.image_splits`] makes them, or one split, of which a random part is held out.
        max_exits (`int`, *optional*, defaults to 4): The most early exits that are chosen.
        max_accuracy_drop (`float`, *optional*, defaults to 0.5): Points that may be lost against the plain network.
        exit_points (`Sequence[str]`, *optional*): The candidates. Defaults to every block
            ([`~hf_scan.workflows.candidates.find_candidates`]).
        holdout (`float`, *optional*, defaults to 0.2): Share of a single split that is held out.
        num_epochs (`float`, *optional*, defaults to 4): Epochs that heads are trained.
        batch_size (`int`, *optional*, defaults to 64): Images of a training step.
        costs (`str` or [`~hf_scan.workflows.part_costs.PartCosts`], *optional*, defaults to `"macs"`): What to count:
            `"macs"`, or milliseconds of `"pytorch"` or `"onnx"` on this machine.
        output_dir (`str` or `Path`, *optional*): A folder for checkpoints, from which a search that was interrupted
            goes on, and for what it finds. Defaults to none. Of a module of your own, there are no checkpoints.
        seed (`int`, *optional*, defaults to 0): Of the heads' weights, the order of images and the split.
        training_arguments: More arguments of [`ScanTrainingArguments`], in place of those of
            [`~hf_scan.workflows.recipes.HEADS_RECIPE`].

    Returns:
        [`ExitSearch`]: a table when printed.

    Raises:
        `ValueError`: if an argument is out of range, there are too few images to search on, the network or its heads
            are trained on them, or the network has no place for an exit.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification, search_exits

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(60)]
    >>> found = search_exits(model, images, max_exits=1, num_epochs=1, use_cpu=True)
          epoch 1 of 1: loss ...
    >>> len(found.exit_points) <= 1, found.verdict.answer in ("pays", "may pay", "does not pay")
    (True, True)
    ```
    """
    if max_exits < 1:
        raise ValueError(f"`max_exits` is {max_exits}; expected a whole number of at least 1.")
    if not 0 <= max_accuracy_drop <= 100:
        raise ValueError(f"`max_accuracy_drop` is {max_accuracy_drop}; expected points from 0 to 100, such as 0.5.")
    splits = _split(dataset, holdout, seed)
    _check_count(len(splits["search"]), max_accuracy_drop)
    check_unseen(splits["search"], "search", model.exit_config.trained_on, "The network was trained")
    check_unseen(splits["search"], "search", some_digests(splits["train"]), "Heads would be trained")
    wide = wide_network(model, max_exits, exit_points, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output_dir or scratch)
        settings: dict[str, Any] = {
            "num_train_epochs": num_epochs,
            "per_device_train_batch_size": batch_size,
            "seed": seed,
        }
        # Of a module of the user's own, no checkpoint can be saved.
        resumable = output_dir is not None and model.config.backbone_source != "custom"
        settings |= training_arguments
        train_candidates(wide, splits["train"], folder, resumable, TrainingProgress(), **settings)
    wide.eval()
    table = collect_exit_logits(wide, splits["search"], "search")
    if isinstance(costs, str):
        costs = costs_of_parts(wide, costs)
    dropped = candidates_of(model).dropped if exit_points is None else {}
    found = choose_exits(wide, table, costs, max_exits, max_accuracy_drop, dropped)
    if output_dir is not None:
        write_whole(Path(output_dir, "search.json"), json.dumps(found.to_dict(), indent=2) + "\n")
    return found


def choose_exits(
    model: ScanForImageClassification,
    table: ExitTable,
    costs: PartCosts,
    max_exits: int,
    max_accuracy_drop: float,
    dropped: Mapping[str, str] | None = None,
    plain: ExitTable | None = None,
) -> ExitSearch:
    """
    Choose among the exits of a network by what they answer and cost: the last step of [`search_exits`].

    Args:
        model ([`ScanForImageClassification`]): With an exit at every candidate.
        table ([`~hf_scan.calibration.ExitTable`]): What they answer on held-out images.
        costs ([`~hf_scan.workflows.part_costs.PartCosts`]): Of stages and heads.
        max_exits, max_accuracy_drop: As for [`search_exits`].
        dropped (`Mapping[str, str]`, *optional*): Modules that were not tried, with the reason, for the table.
        plain ([`~hf_scan.calibration.ExitTable`], *optional*): Whose deepest exit is the plain network, where `model`
            was trained further. Defaults to `table`.
    """
    problem = Problem.of(table, costs.shares, plain=plain)
    placement = place_exits(problem, max_exits, max_accuracy_drop)
    names = [stage.name for stage in model.stages[:-1]]
    accuracies = problem.correct.mean(axis=0)
    plain_accuracy = float(problem.baseline.mean())
    rows = [
        {
            "name": name,
            "cost": float(problem.cumulative([index])[0]),
            "head": float(problem.heads[index]),
            "accuracy": float(accuracies[index]),
            "speedup": 1 / placement.alone[index],
            "chosen": index in placement.exits,
        }
        for index, name in enumerate(names)
    ]
    chosen = [names[index] for index in placement.exits]
    verdict = verdict_of_search(
        1 / placement.fitted_cost,
        max_accuracy_drop,
        names,
        accuracies[:-1].tolist(),
        placement.alone,
        problem.heads[:-1].tolist(),
        plain_accuracy,
        chosen,
        placement.fitted_drop,
        len(table),
    )
    return ExitSearch(
        config=with_exits(model.config, chosen) if chosen else model.config,
        rows=rows,
        plain=plain_accuracy,
        deepest=float(accuracies[-1]),
        speedup=1 / placement.fitted_cost,
        drop=placement.fitted_drop,
        accuracy_margin=placement.accuracy_margin,
        oracle=1 / placement.oracle_cost,
        unit=costs.unit,
        verdict=verdict,
        model=model,
        table=table,
        dropped=dict(dropped or {}),
    )


def _split(dataset: Any, holdout: float, seed: int) -> dict[str, Any]:
    """Return the images to train heads on and those to search on."""
    if isinstance(dataset, Mapping):
        if missing := [name for name in ("train", "search") if name not in dataset]:
            raise ValueError(
                f"`dataset` has the splits {sorted(dataset)} and no {missing[0]!r}; expected 'train' and 'search', as "
                "`image_splits` makes them."
            )
        return {name: dataset[name] for name in ("train", "search")}
    if not 0 < holdout < 1:
        raise ValueError(f"`holdout` is {holdout}; expected a share between 0 and 1.")
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    held_out = round(holdout * len(dataset))
    return {"train": Subset(dataset, sorted(order[held_out:])), "search": Subset(dataset, sorted(order[:held_out]))}


def _check_count(count: int, max_accuracy_drop: float) -> None:
    if count < LEAST_SAMPLES:
        raise ValueError(
            f"There are {count} images to search on; expected at least {LEAST_SAMPLES}, and better 1,000. Use more "
            "images or a larger `holdout`."
        )
    if 0 < max_accuracy_drop < 100 / count:
        logger.warning(
            f"`max_accuracy_drop` is {max_accuracy_drop:g} points, and one of {count} images to search on is "
            f"{100 / count:.2f} points, so that no loss at all is allowed. {round(100 / max_accuracy_drop):,} images "
            "are the least for this target, and ten times as many make it sure."
        )


def wide_network(
    model: ScanForImageClassification, max_exits: int, exit_points: Sequence[str] | None = None, seed: int = 0
) -> ScanForImageClassification:
    """
    Return a network with an exit at every candidate, whose heads are fresh.

    Args:
        model ([`ScanForImageClassification`]): Whose backbone is taken over.
        max_exits, exit_points, seed: As for [`search_exits`].
    """
    points = None if exit_points is None else list(exit_points)
    torch.manual_seed(seed)
    wide = network_of(with_candidates(model.config, max_exits, points, model.backbone), model.backbone)
    wide.backbone.load_state_dict(model.backbone.state_dict())
    wide.exit_config = wide.exit_config.replace(trained_on=model.exit_config.trained_on)
    moved: ScanForImageClassification = wide.to(device=model.device, memory_format=torch.channels_last)
    return moved


def train_candidates(
    model: ScanForImageClassification,
    images: Any,
    folder: str | Path,
    resumable: bool,
    progress: TrainerCallback | None = None,
    **settings: Any,
) -> None:
    """
    Train the heads of all exits together.

    Args:
        model ([`ScanForImageClassification`]): Trained in place.
        images (`Dataset`): Transformed, with labels.
        folder (`str` or `Path`): For checkpoints.
        resumable (`bool`): Whether to write one after each epoch, and to go on from the last one that is there.
        progress (`TrainerCallback`, *optional*): Shows how far it is, in place of what the `Trainer` prints.
        settings: As for [`heads_arguments`].
    """
    whole = len(images) >= settings.get("per_device_train_batch_size", HEADS_RECIPE["per_device_train_batch_size"])
    saved = "epoch" if resumable else "no"
    defaults = {"save_strategy": saved, "dataloader_drop_last": whole, "disable_tqdm": progress is not None}
    arguments = heads_arguments(folder, **{**defaults, **settings})
    trainer = ScanTrainer(model, arguments, train_dataset=images)
    if progress is not None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) if resumable else None)


def heads_arguments(folder: str | Path, **settings: Any) -> ScanTrainingArguments:
    """
    Return how fresh heads are trained on a frozen backbone, by [`~hf_scan.workflows.recipes.HEADS_RECIPE`], without
    hints.

    Args:
        folder (`str` or `Path`): For checkpoints.
        settings: Arguments of [`ScanTrainingArguments`] that differ.
    """
    defaults: dict[str, Any] = {
        **HEADS_RECIPE,
        "freeze_backbone": True,
        "distillation_preset": "successor",
        "save_total_limit": 1,
        "logging_strategy": "epoch",
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return ScanTrainingArguments(output_dir=str(folder), **{**defaults, **settings})


__all__ = ["ExitSearch", "choose_exits", "heads_arguments", "search_exits", "train_candidates", "wide_network"]
