# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A search for thresholds, from arguments to the figures and pictures beside a trained network."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, HfArgumentParser

from ..calibration.calibrate import calibrate
from ..calibration.certify import RiskBound
from ..calibration.exit_frontier import exit_frontier
from ..calibration.exit_table import ExitTable, collect_exit_logits
from ..calibration.frontier import oracle_policy, shared_threshold_frontier
from ..calibration.monitor import ExitMonitor
from ..costs.cost_model import CostModel
from ..costs.measure import count_macs, describe_machine, measure_costs, realised_speedup
from ..data.transforms import eval_transform
from ..metrics.scan_accuracy.scan_accuracy import ScanAccuracy
from ..model.exit_config import EXIT_CONFIG_NAME
from ..model.exit_rule import apply_exit_rule, plan_exits
from ..model.modeling_scan import ScanForImageClassification
from ..reporting.model_card import create_model_card
from ..reporting.plotting import plot_exit_shares, plot_frontier, plot_reliability
from ..reporting.report import exit_report, exit_table
from ..reporting.saved_frontier import SavedFrontier
from ..training.output_dirs import lock_output_folder, replaced_folder
from .data_arguments import DataArguments, load_splits, metadata, title
from .json_files import read_json
from .verdict import Verdict, verdict_of_run


# How many images a speed-up is measured on, for a verdict: some seconds on a CPU.
TIMED_IMAGES = 64


@dataclass
class CalibrationArguments:
    """The target, and where the result goes."""

    model: str = field(metadata={"help": "A folder with a trained network, or a repository on the Hub."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write into. Defaults to the model's."})
    exit_config_name: str = field(
        default=EXIT_CONFIG_NAME, metadata={"help": "File to write: another name keeps another operating point."}
    )
    seed: int | None = field(
        default=None,
        metadata={"help": "Of the run that trained it, which divided the images. Defaults to what it wrote."},
    )
    max_accuracy_drop: float | None = field(
        default=None, metadata={"help": "Points that may be lost against the deepest exit."}
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "Least accuracy, from 0 to 1."})
    max_latency_ms: float | None = field(default=None, metadata={"help": "Most milliseconds for an image."})
    latency: str = field(default="mean", metadata={"help": "'mean', or 'p95': what 95 %% of the images keep to."})
    max_macs: float | None = field(default=None, metadata={"help": "Most MACs for an image in the mean."})
    speedup: float | None = field(default=None, metadata={"help": "Least speed-up over the plain backbone."})
    guarantee: float | None = field(default=None, metadata={"help": "Points that are certified not to be exceeded."})
    delta: float = field(default=0.05, metadata={"help": "Probability with which the guarantee may be wrong."})
    loss: str = field(
        default="gap", metadata={"help": "What is guaranteed: 'gap' in accuracy, 'disagreement' or 'error'."}
    )
    beta: float = field(
        default=0.5,
        metadata={"help": "Without a target: acceleration that a point of accuracy is worth in the genetic search."},
    )
    generations: int = field(default=100, metadata={"help": "Of the genetic search."})
    population_size: int = field(default=50, metadata={"help": "Of the genetic search."})
    temperatures: list[float] | None = field(
        default=None, metadata={"help": "One for each exit, by which its logits are divided before they are scored."}
    )
    fallback: str = field(default="ensemble", metadata={"help": "'ensemble', 'deepest' or 'most_confident'."})
    criterion: str = field(default="confidence", metadata={"help": "What a score is; see `ExitConfig`."})
    measure: bool = field(default=True, metadata={"help": "Measure first what the exits cost here."})
    batch_size: int = field(default=1, metadata={"help": "Images at a time that costs are measured for."})

    def target(self) -> dict[str, Any]:
        """Return the target as arguments of [`~hf_scan.calibrate`]."""
        names = ("max_accuracy_drop", "min_accuracy", "max_latency_ms", "max_macs", "speedup")
        target: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.max_latency_ms is not None:
            target["latency"] = self.latency
        if self.guarantee is not None:
            target["guarantee"] = RiskBound(self.guarantee, self.delta, self.loss)  # type: ignore[arg-type]
        settings = ("beta", "generations", "population_size")
        return target or {**{name: getattr(self, name) for name in settings}, "seed": self.seed or 0}


def score(model: ScanForImageClassification, table: ExitTable) -> dict[str, float]:
    """Return the accuracy of every exit and of the adaptive answers, shares and mean cost, as the Trainer."""
    config = model.exit_config
    confidences, predictions = table.columns(config)
    return ScanAccuracy().compute(
        predictions=predictions,
        confidences=confidences,
        references=table.labels,
        thresholds=config.thresholds,
        fallback=config.fallback,
        costs=count_macs(model).relative(config),
    )


def judge(
    model: ScanForImageClassification, scores: dict[str, float], images: torch.Tensor, batch_size: int = 1
) -> Verdict:
    """
    Return whether early exits pay, from the speed-up that is measured on some images and the answers on a split.

    Args:
        model ([`ScanForImageClassification`]): The network with its exit configuration, in evaluation mode.
        scores (`dict[str, float]`): Of `ScanAccuracy`, on a split that found no thresholds.
        images (`torch.Tensor` of shape `(n, num_channels, height, width)`): Images of that split, to measure on.
        batch_size (`int`, *optional*, defaults to 1): Images at a time.
    """
    config, exits = model.exit_config, range(model.num_exits)
    images = images.to(model.device, model.dtype, memory_format=torch.channels_last)
    measured = realised_speedup(model, images, min(batch_size, len(images)), rounds=3)
    cost_model = CostModel.of(model, batch_size)
    heads = [
        head / cost_model.plain if step.runs_head else 0.0
        for head, step in zip(cost_model.costs.heads, plan_exits(config, model.num_exits))
    ]
    return verdict_of_run(
        measured.speedup,
        100 * (scores["accuracy"] - scores["adaptive_accuracy"]),
        [scores[f"exit_{index}_accuracy"] for index in exits],
        [scores[f"exit_{index}_share"] for index in exits[:-1]],
        [float(cost) / cost_model.plain_image for cost in cost_model.cumulative(config)[: model.num_exits - 1]],
        heads[:-1],
    )


def images_to_time(rows: Any) -> torch.Tensor:
    """Return the first images of a split as a batch, to measure on."""
    return torch.stack([rows[index]["pixel_values"] for index in range(min(TIMED_IMAGES, len(rows)))])


def draw(
    model: ScanForImageClassification, search: ExitTable, test: ExitTable, cost_model: CostModel, folder: Path
) -> None:
    """Draw the frontier with the chosen policy, where samples leave, and how far confidences can be trusted."""
    config = model.exit_config
    last = "most confident" if config.fallback == "most_confident" else "ensemble"
    names = [*(f"exit {index}" for index in range(model.num_exits)), last]
    frontier = exit_frontier(search, config, cost_model.cumulative)
    SavedFrontier.of(search, config, cost_model, frontier).save(folder)
    every = config.replace(thresholds=[0.5] * (model.num_exits - 1))
    scores, predictions = search.columns(every)
    columns = model.num_exits + (config.fallback != "deepest")
    right = (predictions == search.labels[:, None])[:, :columns]
    costs = cost_model.cumulative(every)[:columns]
    points = {
        "chosen": (config.search["accuracy"], config.search["cost"] * cost_model.plain_image)
        if config.search
        else (0, 0),
        "deepest exit, without the others": (float((search.deepest == search.labels).mean()), cost_model.plain_image),
        "oracle: leaves at the first exit that is right": oracle_policy(right, costs),
    }
    unit = cost_model.unit.split(":")[0]
    shared = shared_threshold_frontier(scores[:, :columns], right, costs)
    plot_frontier(frontier, folder / "frontier.png", f"{unit} ({search.split} split)", shared, points)

    answers = apply_exit_rule(torch.from_numpy(test.logits).unbind(1), config)
    monitor = ExitMonitor(model)
    monitor.update(answers)
    shares = {search.split: monitor.exit_shares_at_calibration, test.split: monitor.exit_shares}
    plot_exit_shares(shares, names, folder / "exits.png")
    confidences, predictions = test.columns(config.replace(criterion="confidence"))
    plot_reliability(confidences, predictions == test.labels[:, None], names, folder / "reliability.png")


def parse_calibration_arguments(
    arguments: list[str], description: str | None = None, prog: str | None = None
) -> tuple[DataArguments, CalibrationArguments]:
    """Parse the flags of a search; `description` and `prog` are what `--help` says first and calls the program."""
    parser = HfArgumentParser((DataArguments, CalibrationArguments), description=description, prog=prog)
    data, request = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return data, request


def run_calibration(data: DataArguments, arguments: CalibrationArguments) -> dict[str, Any]:
    """
    Find the thresholds of a trained network, test them, and write them beside it with figures and pictures.

    Args:
        data ([`DataArguments`]): The images that the network was trained on, divided as then.
        arguments ([`CalibrationArguments`]): The network, the target, and where the result goes.

    Returns:
        `dict[str, Any]`: what `metrics.json` holds.

    Raises:
        `ValueError`: as [`~hf_scan.calibrate`], and if there are no images to search on.
    """
    if not data.holdout and data.search_split is None:
        raise ValueError(
            "`--holdout` is 0; thresholds need images that training did not see. Give the run's holdout, or name a "
            "split with `--search_split`."
        )
    model = ScanForImageClassification.from_pretrained(arguments.model).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    folder = Path(arguments.output_dir or arguments.model)
    lock = lock_output_folder(folder, keep=["*"])
    written = Path(arguments.model, "metrics.json")
    facts: dict[str, Any] = read_json(written, "the figures of its run") if written.is_file() else {}
    arguments.seed = facts.get("seed", 0) if arguments.seed is None else arguments.seed
    splits = load_splits(data, arguments.seed, validate="validation" in facts.get("splits", {}))
    rows = {name: splits[name].with_transform(eval_transform(processor)) for name in ("search", "test")}
    search, test = (collect_exit_logits(model, images, name) for name, images in rows.items())
    if arguments.measure:
        print(f"Measuring the exits in batches of {arguments.batch_size}", flush=True)
        costs = measure_costs(model.to(memory_format=torch.channels_last), arguments.batch_size)
        model.exit_config = model.exit_config.replace(costs=costs)

    target = arguments.target()
    names = ("fallback", "criterion", "temperatures", "batch_size")
    settings = {name: getattr(arguments, name) for name in names}
    model.exit_config = calibrate(model, search, **settings, **target)
    scores = score(model, test)
    known = {row["name"]: row for row in facts.get("rows", [])}
    plain_accuracy = known.get("plain backbone", {}).get("accuracy")
    report = exit_report(model, scores, plain_accuracy=plain_accuracy)
    verdict = judge(model, scores, images_to_time(rows["test"]), arguments.batch_size)
    report["verdict"] = verdict.to_dict()
    facts = {
        "dataset": title(data.dataset_name),
        "seed": arguments.seed,
        "machine": describe_machine(model.device),
        **{name: value for name, value in facts.items() if name not in ("rows", "speedup")},
        "splits": {name: len(split) for name, split in splits.items()},
    }
    _print_result(model, report, facts, scores["accuracy"] - scores["adaptive_accuracy"], len(test))
    print(verdict)
    cost_model = CostModel.of(model, arguments.batch_size, macs="max_macs" in target)
    with replaced_folder(folder, keep=["*"]) as new:
        draw(model, search, test, cost_model, new)
        model.exit_config.save_pretrained(new, arguments.exit_config_name)
        if arguments.exit_config_name == EXIT_CONFIG_NAME:
            (new / "metrics.json").write_text(json.dumps({**facts, **report}, indent=2) + "\n", encoding="utf-8")
            shown = {**facts, "frontier": "frontier.png"}
            create_model_card(model, report, shown, title(arguments.model), **metadata(data)).save(new / "README.md")
    lock.release()
    print(f"Written to {folder}: {arguments.exit_config_name}, frontier.png, exits.png, reliability.png")
    return {**facts, **report}


def _print_result(
    model: ScanForImageClassification, report: dict[str, Any], facts: dict[str, Any], drop: float, count: int
) -> None:
    print(f"\n{count} test images of {facts['dataset']}, seed {facts['seed']}")
    print(exit_table(report))
    print(f"drop against the deepest exit there: {100 * drop:+.2f} points")
    for name, values in (("search", model.exit_config.search), ("guarantee", model.exit_config.guarantee)):
        for key, value in (values or {}).items():
            print(f"{name}, {key}: {value}")


__all__ = ["CalibrationArguments", "parse_calibration_arguments", "run_calibration"]
