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
from .style import (
    CHOSEN,
    FONT_SIZE,
    LOOKS,
    NEUTRAL,
    WIDTH,
    Theme,
    colour_of,
    dress,
    ink_on,
    new_figure,
    save_figure,
)


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
    figure = new_figure(2.2 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, text in zip(axes, images, describe_answers(answers, model)):
        axis.imshow(image, cmap="gray", interpolation="nearest")
        axis.set_title(text, fontsize=9)
    save_figure(figure, path)


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
    pictures = undo_preprocessing(model, pixel_values)
    count, size = len(pixel_values), pixel_values.shape[-2:]
    figure = new_figure(1.9 * count + 0.6, 2.1 * model.num_exits)
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
    save_figure(figure, path)


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
    figure = new_figure(max(5.2, 3.6 * len(panels)), 3.4)
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for exit_name in sorted(curves):
            colour = NEUTRAL if exit_name == "ensemble" else colour_of(int(exit_name.removeprefix("exit ")))
            marker = "." if len(curves[exit_name]) < 3 else None
            axis.plot(*zip(*curves[exit_name]), label=exit_name, color=colour, marker=marker)
        axis.set(title=title, xlabel="epoch")
        axis.legend()
        dress(axis)
    save_figure(figure, path)


def plot_frontier(
    frontier: "Frontier",
    path: str | Path,
    unit: str,
    shared: "Frontier | None" = None,
    points: Mapping[str, tuple[float, float]] | None = None,
    theme: Theme = "light",
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
        points (`Mapping[str, tuple[float, float]]`, *optional*): Accuracy in [0, 1] and cost, by name. The first is
            the one that was chosen.
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`, as the page around the picture.
    """
    figure = new_figure(height=4.0, theme=theme)
    axis = figure.subplots()
    width = {"linewidth": 2.2}
    axis.plot(frontier.cost, 100 * frontier.accuracy, color=colour_of(0), label="a threshold for each exit", **width)
    if shared is not None:
        axis.plot(shared.cost, 100 * shared.accuracy, "--", color=NEUTRAL, label="one threshold for all exits")
    for index, (name, (accuracy, cost)) in enumerate((points or {}).items()):
        colour = CHOSEN if index == 0 else colour_of(index)
        axis.plot([cost], [100 * accuracy], "oDs^v"[index % 5], color=colour, markersize=8, label=name, zorder=3)
    # What the unit says of the machine has a line of its own.
    name, _, rest = unit.partition(": ")
    axis.set(xlabel=f"mean cost of an image, {name}{chr(10) if rest else ''}{rest}", ylabel="accuracy, %")
    axis.legend(loc="lower right")
    dress(axis, theme)
    save_figure(figure, path)


def plot_exit_shares(
    shares: Mapping[str, Sequence[float]], names: Sequence[str], path: str | Path, theme: Theme = "light"
) -> None:
    """
    Draw where images leave, with a stacked bar for each split.

    Args:
        shares (`Mapping[str, Sequence[float]]`): Shares in [0, 1], one for each name, by split.
        names (`Sequence[str]`): Names of the exits and of the fallback.
        path (`str` or `Path`): The picture to write. Its suffix gives the format.
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`, as the page around the picture.
    """
    figure = new_figure(height=1.3 + 0.55 * len(shares), theme=theme)
    axis = figure.subplots()
    splits = list(shares)
    starts = [0.0] * len(splits)
    for index, name in enumerate(names):
        values = [100 * shares[split][index] for split in splits]
        bars = axis.barh(splits, values, 0.62, left=starts, color=colour_of(index), label=name)
        # In the bar where there is room for it.
        texts = [f"{value:.0f} %" if value >= 7 else "" for value in values]
        axis.bar_label(bars, texts, label_type="center", fontsize=FONT_SIZE, color=ink_on(colour_of(index)))
        starts = [start + value for start, value in zip(starts, values)]
    axis.set(xlim=(0, 100), xlabel="answered here, % of the images")
    axis.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=min(4, len(names)), frameon=False, fontsize=FONT_SIZE - 1)
    for text in figure.legends[0].get_texts():
        text.set_color(LOOKS[theme].text)
    dress(axis, theme, grid=None)
    save_figure(figure, path)


def plot_reliability(
    confidences: np.ndarray,
    correct: np.ndarray,
    names: Sequence[str],
    path: str | Path,
    bins: int = 10,
    theme: Theme = "light",
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
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`, as the page around the picture.
    """
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(max(4.0, WIDTH * columns / 4), 0.4 + 2.2 * rows, theme)
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for column, (axis, name) in enumerate(zip(axes, names)):
        counts = np.bincount(places[:, column], minlength=bins)
        filled = counts > 0
        mean = np.bincount(places[:, column], confidences[:, column], bins)[filled] / counts[filled]
        right = np.bincount(places[:, column], correct[:, column], bins)[filled] / counts[filled]
        error = float((abs(mean - right) * counts[filled]).sum() / len(confidences))
        shares = counts / len(confidences)
        axis.bar((np.arange(bins) + 0.5) / bins, shares, 0.9 / bins, color=NEUTRAL, alpha=0.45)
        axis.plot([0, 1], [0, 1], ":", color=NEUTRAL)
        axis.plot(mean, right, "o-", markersize=4, color=colour_of(column))
        axis.set(title=f"{name}\nECE {100 * error:.1f} %", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        dress(axis, theme)
    axes[0].set_ylabel("accuracy; bars: share of images")
    dress(axes[0], theme)
    save_figure(figure, path)


def plot_placement(
    rows: Sequence[Mapping[str, Any]], deepest: float, unit: str, path: str | Path, theme: Theme = "light"
) -> None:
    """
    Draw the accuracy of every candidate exit over its depth, and what each gains alone.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): Of each candidate `name`, `cost` (a share of the plain network's),
            `accuracy` in [0, 1], `speedup` and `chosen`.
        deepest (`float`): The plain network's accuracy.
        unit (`str`): What costs count.
        path (`str` or `Path`): The picture to write; its ending gives the format.
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`, as the page around the picture.
    """
    figure = new_figure(max(WIDTH, 0.42 * len(rows) + 2), 6.0, theme)
    accuracy, gain = figure.subplots(2, 1)
    costs = [100 * row["cost"] for row in rows]
    values = [100 * row["accuracy"] for row in rows]
    accuracy.axhline(100 * deepest, color=NEUTRAL, linestyle=":", label="plain network")
    accuracy.plot([*costs, 100], [*values, 100 * deepest], "o-", color=colour_of(0), label="a head at each block")
    chosen = [index for index, row in enumerate(rows) if row["chosen"]]
    picked = [costs[index] for index in chosen], [values[index] for index in chosen]
    accuracy.plot(*picked, "o", color=CHOSEN, markersize=10, label="chosen")
    accuracy.set(xlabel=f"cost of an answer, % of the plain network's ({unit.split(',')[0]})", ylabel="accuracy, %")
    accuracy.legend(loc="lower right")
    dress(accuracy, theme)
    colours = [CHOSEN if row["chosen"] else colour_of(0) for row in rows]
    bars = gain.bar(range(len(rows)), [row["speedup"] for row in rows], color=colours)
    gain.bar_label(bars, fmt="%.2f", fontsize=FONT_SIZE - 2, color=LOOKS[theme].text)
    gain.axhline(1.0, color=NEUTRAL, linestyle=":")
    gain.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=45, ha="right")
    gain.set_ylabel("speed-up with this exit alone, x")
    dress(gain, theme, grid="y")
    save_figure(figure, path)


def undo_preprocessing(model: "ScanForImageClassification", pixel_values: torch.Tensor) -> torch.Tensor:
    """Return images to draw, of shape `(batch_size, height, width, 3)` from 0 to 1."""
    settings = model.config.preprocessing
    assert settings is not None  # the network filled it in
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pictures = (pixel_values.float().cpu() * std + mean).clamp(0, 1)
    if pictures.shape[1] != 3:
        pictures = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return pictures.permute(0, 2, 3, 1)
