# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what the exits do. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .adaptive import AdaptiveOutput
from .exit_criteria import confidence_of


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
    """A text for each answer: the class, and below it the exit it came from and its confidence."""
    lines = []
    for logits, exit_index, confidence in zip(answers.logits, answers.exit_index, answers.confidence):
        label = model.config.id2label[int(logits.argmax())]
        place = "ensemble" if exit_index == model.num_exits else f"exit {int(exit_index)}"
        lines.append(f"{label}\n{place}, {float(confidence):.3f}")
    return lines


def plot_attention(model: "ScanForImageClassification", pixel_values: torch.Tensor, path: str | Path) -> None:
    """
    Draws what each early exit looks at: a row for each exit, its attention mask over the images, and the answer and
    its confidence below. The mask is the mean over its channels, bright where much is let through, from the smallest
    value in the image to the largest. The last row shows the images as they are, with
    the deepest exit's answer.

    Source: Zhang et al., "SCAN", NeurIPS 2019, which shows its attention maps so.

    Args:
        model ([`ScanForImageClassification`]): A trained network with attention modules.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): A few prepared images.
        path (`str` or `Path`): The picture to write; its ending gives the format.

    Raises:
        `ValueError`: if the network has no attention modules.
    """
    if model.config.attention_type == "none":
        raise ValueError(
            "The network has no attention modules (`attention_type` is 'none'); there is no mask to show."
        )
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        output = model(pixel_values.to(model.device, model.dtype), output_attentions=True)
    model.train(was_training)
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
    Draws a run: for each exit, its loss on the train images, term by term added up, and, where it was evaluated on the
    way, its accuracy.

    Args:
        log_history (`Sequence[Mapping[str, float]]`): A trainer's `state.log_history`.
        path (`str` or `Path`): The picture to write; its ending gives the format.
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
        raise ValueError("The log holds no exit's loss or accuracy; expected the `state.log_history` of a run.")
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


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib; install it with `pip install matplotlib`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _undo_preprocessing(model: "ScanForImageClassification", pixel_values: torch.Tensor) -> torch.Tensor:
    """Images to look at, `(batch_size, height, width, 3)` from 0 to 1."""
    settings = model.config.preprocessing
    assert settings is not None  # the network filled it in
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pictures = (pixel_values.float().cpu() * std + mean).clamp(0, 1)
    if pictures.shape[1] != 3:
        pictures = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return pictures.permute(0, 2, 3, 1)
