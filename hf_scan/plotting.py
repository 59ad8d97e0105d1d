# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what the exits do. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adaptive import AdaptiveOutput


if TYPE_CHECKING:
    from .modeling_scan import ScanForImageClassification


def plot_answers(
    images: Sequence[Any],
    answers: AdaptiveOutput,
    model: "ScanForImageClassification",
    path: str | Path,
    columns: int = 4,
) -> None:
    """
    Draws images with the answer each got, where, and how sure it was.

    Args:
        images (`Sequence`): PIL images or arrays.
        answers ([`AdaptiveOutput`]): Their answers.
        model ([`ScanForImageClassification`]): The network that gave them; it knows the names of the classes.
        path (`str` or `Path`): The picture to write; its ending gives the format.
        columns (`int`, *optional*, defaults to 4): Pictures in a row.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib; install it with `pip install matplotlib`.") from error

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, text in zip(axes, images, describe_answers(answers, model)):
        axis.imshow(image, cmap="gray", interpolation="nearest")
        axis.set_title(text, fontsize=9)
    figure.savefig(path, dpi=120)


def describe_answers(answers: AdaptiveOutput, model: "ScanForImageClassification") -> list[str]:
    """A text for each answer: the class, and below it the exit it came from and its confidence."""
    lines = []
    for logits, exit_index, confidence in zip(answers.logits, answers.exit_index, answers.confidence):
        label = model.config.id2label[int(logits.argmax())]
        place = "ensemble" if exit_index == model.num_exits else f"exit {int(exit_index)}"
        lines.append(f"{label}\n{place}, {float(confidence):.3f}")
    return lines
