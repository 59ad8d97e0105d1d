# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Draw what the exits do, with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..model.evaluation_mode import evaluating
from ..model.exit_criteria import confidence_of
from ..model.exit_rule import AdaptiveOutput


if TYPE_CHECKING:
    from ..calibration.frontier import Frontier
    from ..model.modeling_scan import ScanForImageClassification


def plot_answers(
    images: Sequence[Any],
    answers: AdaptiveOutput,
    model: "ScanForImageClassification",
    path: str | Path,
    columns: int = 4,
) -> None:
    """
    Draw images with their answers, the exits that gave them and their confidences.

    Args:
        images (`Sequence`): PIL images or arrays.
        answers ([`AdaptiveOutput`]): Their answers.
        model ([`ScanForImageClassification`]): The network that gave them, with the names of the classes.
        path (`str` or `Path`): The picture to write. Its suffix gives the format.
        columns (`int`, *optional*, defaults to 4): Number of images in a row.
    """
    rows = -(-len(images) // columns)
    figure = _figure(2.2 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, text in zip(axes, images, describe_answers(answers, model)):
        axis.imshow(image, cmap="gray", interpolation="nearest")
        axis.set_title(text, fontsize=9)
    figure.savefig(path, dpi=120)


def describe_answers(answers: AdaptiveOutput, model: "ScanForImageClassification") -> list[str]:
    """Return a text for each answer: the class, and below it the exit that gave it and its confidence."""
    lines = []
    for logits, exit_index, confidence in zip(answers.logits, answers.exit_index, answers.confidence):
        label = model.config.id2label[int(logits.argmax())]
        place = "ensemble" if exit_index == model.num_exits else f"exit {int(exit_index)}"
        lines.append(f"{label}\n{place}, {float(confidence):.3f}")
    return lines


def plot_attention(model: "ScanForImageClassification", pixel_values: torch.Tensor, path: str | Path) -> None:
    """
    Draw each early exit's attention: a row for each exit, its mask over the images, with the answer and its confidence
    below. The mask is the mean over its channels, from dark (the smallest value in the image) to bright (the largest).
    The last row shows the images without a mask and the deepest exit's answers.

    Source: the attention maps of Zhang et al., "SCAN", NeurIPS 2019.

    Args:
        model ([`ScanForImageClassification`]): A trained network with attention modules.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): A few prepared images.
        path (`str` or `Path`): The picture to write. Its suffix gives the format.

    Raises:
        `ValueError`: if the network has no attention modules.
    """
    if model.config.attention_type == "none":
        raise ValueError("The network has no attention modules (`attention_type` is 'none'); expected masks to draw.")
    with evaluating(model), torch.inference_mode():
        output = model(pixel_values.to(model.device, model.dtype), output_attentions=True)
    pictures = _undo_preprocessing(model, pixel_values)
    count, size = len(pixel_values), pixel_values.shape[-2:]
    figure = _figure(1.9 * count + 0.6, 2.1 * model.num_exits)
    axes = figure.subplots(model.num_exits, count, squeeze=False)
    for index, (row, logits) in enumerate(zip(axes, output.exit_logits)):
        row[0].set_ylabel(f"exit {index}\n{model.stages[index].name}", fontsize=9)
        confidences = confidence_of(logits)
        for column, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            label = model.config.id2label[int(logits[column].argmax())]
            axis.set_xlabel(f"{label}, {float(confidences[column]):.3f}", fontsize=9)
            axis.imshow(pictures[column].numpy())
            if index < len(output.attentions):
                mask = output.attentions[index][column].float().mean(dim=0)[None, None].cpu()
                mask = F.interpolate(mask, size=size, mode="bilinear")[0, 0]
                axis.imshow(mask.numpy(), cmap="inferno", alpha=0.6)
    figure.savefig(path, dpi=120)


def plot_training(log_history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """
    Draw a training run: each exit's loss on the train split, as the sum of its terms, and its accuracy where it was
    evaluated during the run.

    Args:
        log_history (`Sequence[Mapping[str, float]]`): A trainer's `state.log_history`.
        path (`str` or `Path`): The picture to write. Its suffix gives the format.
    """
    losses: dict[str, list[tuple[float, float]]] = {}
    accuracies: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        sums: dict[str, float] = {}
        for name, value in entry.items():
            parts = name.removeprefix("eval_").split("_")
            exit_name = "ensemble" if parts[0] == "ensemble" else " ".join(parts[:2])
            if name.startswith("exit_") and name.endswith("_loss"):
                sums[exit_name] = sums.get(exit_name, 0.0) + value
            elif name.startswith(("eval_exit_", "eval_ensemble_")) and name.endswith("_accuracy"):
                accuracies.setdefault(exit_name, []).append((entry["epoch"], value))
        for exit_name, value in sums.items():
            losses.setdefault(exit_name, []).append((entry["epoch"], value))
    panels = {"loss": losses, "accuracy on the validation split": accuracies}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError("`log_history` holds no exit's loss or accuracy; expected a trainer's `state.log_history`.")
    figure = _figure(5.0 * len(panels), 3.6)
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for exit_name in sorted(curves):
            colour = "black" if exit_name == "ensemble" else f"C{exit_name.removeprefix('exit ')}"
            marker = "." if len(curves[exit_name]) < 3 else None
            axis.plot(*zip(*curves[exit_name]), label=exit_name, color=colour, marker=marker)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def plot_frontier(
    frontier: "Frontier",
    path: str | Path,
    unit: str,
    shared: "Frontier | None" = None,
    points: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """
    Draw accuracy over cost: the frontier of thresholds, the frontier of one threshold for all exits, and single points
    such as the policy that was chosen.

    Args:
        frontier ([`~hf_scan.calibration.Frontier`]): A result of [`~hf_scan.calibration.exit_frontier`].
        path (`str` or `Path`): The picture to write. Its suffix gives the format.
        unit (`str`): The unit of the cost.
        shared ([`~hf_scan.calibration.Frontier`], *optional*): A result of
            [`~hf_scan.calibration.shared_threshold_frontier`].
        points (`Mapping[str, tuple[float, float]]`, *optional*): Accuracy in [0, 1] and cost, by name.
    """
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    axis.plot(frontier.cost, 100 * frontier.accuracy, label="a threshold for each exit, or none")
    if shared is not None:
        axis.plot(shared.cost, 100 * shared.accuracy, "--", color="grey", label="one threshold for all exits")
    for index, (name, (accuracy, cost)) in enumerate((points or {}).items()):
        axis.plot([cost], [100 * accuracy], "oDs^v"[index % 5], color=f"C{index + 1}", label=name)
    axis.set(xlabel=f"mean cost of an image, {unit}", ylabel="accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_exit_shares(shares: Mapping[str, Sequence[float]], names: Sequence[str], path: str | Path) -> None:
    """
    Draw the share of samples that each exit answers, with a bar for each split.

    Args:
        shares (`Mapping[str, Sequence[float]]`): Shares in [0, 1], one for each name, by split.
        names (`Sequence[str]`): Names of the exits and of the fallback.
        path (`str` or `Path`): The picture to write. Its suffix gives the format.
    """
    figure = _figure(1.4 * len(names) + 2, 3.6)
    axis = figure.subplots()
    width = 0.8 / len(shares)
    for index, (split, values) in enumerate(shares.items()):
        places = [place + (index - (len(shares) - 1) / 2) * width for place in range(len(names))]
        bars = axis.bar(places, [100 * value for value in values], width, label=split)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("answered here, % of the images")
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_reliability(
    confidences: np.ndarray, correct: np.ndarray, names: Sequence[str], path: str | Path, bins: int = 10
) -> None:
    """
    Draw a reliability diagram for each exit: accuracy over confidence, which are equal on the diagonal. Bars show the
    share of samples in each bin.

    Source: reliability diagrams and the expected calibration error (ECE) as in Guo et al., "On Calibration of Modern
    Neural Networks", ICML 2017.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): Confidences in [0, 1].
        correct (`np.ndarray` of shape `(n, columns)`): Whether the answers are right.
        names (`Sequence[str]`): Names of the columns.
        path (`str` or `Path`): The picture to write. Its suffix gives the format.
        bins (`int`, *optional*, defaults to 10): Number of bins of equal width.
    """
    figure = _figure(2.6 * len(names), 3.0)
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    for column, (axis, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names)):
        counts = np.bincount(places[:, column], minlength=bins)
        filled = counts > 0
        mean = np.bincount(places[:, column], confidences[:, column], bins)[filled] / counts[filled]
        right = np.bincount(places[:, column], correct[:, column], bins)[filled] / counts[filled]
        error = float((abs(mean - right) * counts[filled]).sum() / len(confidences))
        axis.bar((np.arange(bins) + 0.5) / bins, counts / len(confidences), 0.9 / bins, color="lightgrey")
        axis.plot([0, 1], [0, 1], ":", color="grey")
        axis.plot(mean, right, "o-", markersize=3)
        axis.set(title=f"{name}\nECE {100 * error:.1f} %", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    figure.axes[0].set_ylabel("accuracy; grey: share of images")
    figure.savefig(path, dpi=120)


def plot_placement(rows: Sequence[Mapping[str, Any]], deepest: float, unit: str, path: str | Path) -> None:
    """
    Draws the accuracy of every candidate exit over its depth, and what each gains alone.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): Of each candidate `name`, `cost` (a share of the plain network's),
            `accuracy` in [0, 1], `speedup` and `chosen`.
        deepest (`float`): The plain network's accuracy.
        unit (`str`): What costs count.
        path (`str` or `Path`): The picture to write; its ending gives the format.
    """
    figure = _figure(0.5 * len(rows) + 4, 6.0)
    accuracy, gain = figure.subplots(2, 1)
    costs = [row["cost"] for row in rows]
    accuracy.plot([*costs, 1.0], [100 * value for value in [*(row["accuracy"] for row in rows), deepest]], "o-")
    chosen = [row for row in rows if row["chosen"]]
    places = [row["cost"] for row in chosen], [100 * row["accuracy"] for row in chosen]
    accuracy.plot(*places, "o", color="C1", markersize=10, label="chosen")
    accuracy.axhline(100 * deepest, color="grey", linestyle=":", label="plain network")
    accuracy.set(xlabel=f"cost of an answer, as a share of the plain network's ({unit.split(',')[0]})")
    accuracy.set(ylabel="accuracy, %")
    accuracy.grid(alpha=0.3)
    accuracy.legend()
    colours = ["C1" if row["chosen"] else "C0" for row in rows]
    bars = gain.bar(range(len(rows)), [row["speedup"] for row in rows], color=colours)
    gain.bar_label(bars, fmt="%.2f", fontsize=8)
    gain.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=45, ha="right")
    gain.set_ylabel("speed-up with this exit alone, x")
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib; install it with `pip install matplotlib`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _undo_preprocessing(model: "ScanForImageClassification", pixel_values: torch.Tensor) -> torch.Tensor:
    """Return images to draw, of shape `(batch_size, height, width, 3)` from 0 to 1."""
    settings = model.config.preprocessing
    assert settings is not None  # the network filled it in
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pictures = (pixel_values.float().cpu() * std + mean).clamp(0, 1)
    if pictures.shape[1] != 3:
        pictures = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return pictures.permute(0, 2, 3, 1)
