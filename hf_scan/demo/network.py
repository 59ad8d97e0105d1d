# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The network behind the demo: every exit's answer to an image, and what it costs. It knows nothing of the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor
from transformers.utils import cached_file

from ..calibration.exit_table import collect_exit_logits
from ..costs.cost_model import CostModel
from ..costs.measure import count_macs, interleaved_medians
from ..model.exit_config import ExitConfig
from ..model.exit_rule import answers_of, apply_exit_rule, exit_columns, plan_exits
from ..model.image_files import eight_bits
from ..model.modeling_scan import ScanForImageClassification
from ..model.problem_type import LABEL_CONFIDENCE
from ..reporting.saved_frontier import FRONTIER_NAME, SavedFrontier


IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAMPLES = "samples"
MOST_SAMPLES = 48
# Images on which a frontier is found that no run has left beside the checkpoint.
MOST_IMAGES = 1000
# For networks whose checkpoint has no thresholds yet.
FIRST_THRESHOLD = 0.9


@dataclass
class ExitView:
    """
    What one exit says of an image.

    Args:
        name (`str`): The exit's name.
        label (`str`): Its answer.
        score (`float`): What the threshold is compared with.
        threshold (`float`, *optional*): `None` where no image can leave.
        state (`str`): `"answered"`, `"passed on"`, `"off"` or `"not run"`.
        macs (`float`): Multiplications until here, as a share of the plain network's.
        attention (`Image.Image`, *optional*): The image, dark where the exit does not look.
    """

    name: str
    label: str
    score: float
    threshold: float | None
    state: str
    macs: float
    attention: Image.Image | None = None


@dataclass
class ImageView:
    """
    What the network says of an image, under some thresholds.

    Args:
        label (`str`): The answer.
        confidence (`float`): How sure it is of it.
        exit_index (`int`): Where the image left; `num_exits` for the ensemble of all exits.
        exits (`list[ExitView]`): Every exit's view, from shallow to deep.
        macs (`float`): Multiplications of the answer, as a share of the plain network's.
        milliseconds (`float`, *optional*): Of the answer, measured; and `plain_milliseconds` of the plain network.
        plain_label (`str`): What the plain network answers.
    """

    label: str
    confidence: float
    exit_index: int
    exits: list[ExitView]
    macs: float
    plain_label: str
    milliseconds: float | None = None
    plain_milliseconds: float | None = None


class DemoNetwork:
    """
    A trained network, or an export of one, that explains its answers.

    Args:
        name (`str`): A folder or a repository on the Hub.
        data (`str` or `Path`, *optional*): A folder of images with a folder for each class. A frontier is found on
            them if none lies beside the checkpoint, and some are shown.
        subfolder (`str`, *optional*): Of an export, such as `"int8"`, which then is run instead of PyTorch.

    Raises:
        `OSError`: if there is no such network.
        `ValueError`: if a folder of `data` is named like no class of the network.
    """

    def __init__(self, name: str, data: str | Path | None = None, subfolder: str | None = None) -> None:
        self.name = name
        exported = subfolder is not None or (_is_export(name) and not Path(name, "model.safetensors").is_file())
        if exported:
            from ..runtime import ORTScanForImageClassification

            self.network: Any = ORTScanForImageClassification.from_pretrained(name, subfolder=subfolder or "")
        else:
            found = ScanForImageClassification.from_pretrained(name).eval()
            self.network = found.to(memory_format=torch.channels_last)
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.labels: dict[int, str] = {int(index): label for index, label in self.network.config.id2label.items()}
        self.runtime = "ONNX Runtime" if exported else "PyTorch"
        self.samples = _sample_files(name, data)
        self.frontier = _find_frontier(name)
        if self.frontier is None and data is not None:
            self.frontier = self._search(Path(data))
        self.macs = count_macs(self.network)

    @property
    def num_exits(self) -> int:
        """How many exits there are, the backbone's own included."""
        return int(self.network.num_exits)

    @property
    def exit_names(self) -> list[str]:
        """The exits, as tables name them: with their stage, where PyTorch knows it."""
        stages = getattr(self.network, "stages", None)
        names = [f"exit {index}" for index in range(self.num_exits)]
        return names if stages is None else [f"{name} · {stage.name}" for name, stage in zip(names, stages)]

    def first_rule(self) -> ExitConfig:
        """Return the rule that the page starts with: the checkpoint's thresholds, or else the frontier's safest."""
        config: ExitConfig = self.network.exit_config
        if config.thresholds is not None:
            return config
        if self.frontier is not None:
            return self.frontier.exit_config(self.frontier.cheapest(0.0))
        return self.one_threshold(FIRST_THRESHOLD)

    def one_threshold(self, threshold: float) -> ExitConfig:
        """Return the rule with one threshold for all exits."""
        config: ExitConfig = self.network.exit_config
        return config.replace(thresholds=[threshold] * (self.num_exits - 1), fallback="deepest")

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return images as the network takes them, `(batch_size, num_channels, height, width)`."""
        prepared = self.processor([eight_bits(image) for image in images], return_tensors="pt")["pixel_values"]
        if isinstance(self.network, nn.Module):
            prepared = prepared.to(self.network.device, self.network.dtype, memory_format=torch.channels_last)
        return prepared

    def explain(self, image: Image.Image, rule: ExitConfig, timed: bool = True) -> ImageView:
        """
        Run every exit on an image, and tell which of them would have answered.

        Args:
            image (`PIL.Image.Image`): The image.
            rule ([`ExitConfig`]): The thresholds.
            timed (`bool`, *optional*, defaults to `True`): Whether to measure the adaptive and the plain network, in
                turns, for about a second.

        Returns:
            [`ImageView`]
        """
        pixels = self.pixels([image])
        with torch.inference_mode():
            logits, masks = self._every_exit(pixels)
        answer = apply_exit_rule(logits, rule)
        classes, scores = exit_columns(logits, rule)
        place = int(answer.exit_index[0])
        cumulative = self.macs.cumulative(rule)
        plan = plan_exits(rule, self.num_exits)
        last = self.num_exits - 1
        views = []
        for index, (name, step) in enumerate(zip(self.exit_names, plan)):
            off = index < last and not step.runs_head
            state = "answered" if index == place else "not run" if index > place else "off" if off else "passed on"
            label = self._label(logits[index][0], rule, int(classes[0, index]))
            attention = None if masks is None or index >= len(masks) else self._spotlight(pixels[0], masks[index][0])
            share = cumulative[index] / self.macs.plain
            views.append(ExitView(name, label, float(scores[0, index]), step.threshold, state, share, attention))
        view = ImageView(
            label=self._label(answer.logits[0], rule, int(answers_of(answer.logits, rule)[0])),
            confidence=float(answer.confidence[0]),
            exit_index=place,
            exits=views,
            macs=cumulative[place] / self.macs.plain,
            plain_label=views[-1].label,
        )
        if timed:
            view.milliseconds, view.plain_milliseconds = self._time(pixels, rule)
        return view

    def answer(self, images: Sequence[Image.Image], rule: ExitConfig) -> list[tuple[str, int, float]]:
        """Return the label, the exit and the confidence of each image, as `predict_adaptive` gives them in batches."""
        found = []
        for start in range(0, len(images), 64):
            with torch.inference_mode():
                answer = self.network.predict_adaptive(self.pixels(images[start : start + 64]), exit_config=rule)
            classes = answers_of(torch.as_tensor(answer.logits), rule)
            for logits, label, place, sure in zip(answer.logits, classes, answer.exit_index, answer.confidence):
                found.append((self._label(logits, rule, int(label)), int(place), float(sure)))
        return found

    def macs_of(self, rule: ExitConfig, exit_index: int) -> float:
        """Return the multiplications of an answer at an exit, as a share of the plain network's."""
        return float(self.macs.cumulative(rule)[exit_index] / self.macs.plain)

    def _label(self, logits: Any, rule: ExitConfig, label: int) -> str:
        if rule.criterion == LABEL_CONFIDENCE:
            chosen = [self.labels[index] for index in range(len(logits)) if float(logits[index]) > 0]
            return ", ".join(chosen) or "nothing"
        return self.labels[label]

    def _every_exit(self, pixels: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Return the logits of every exit, and the attention of the early ones where there is one."""
        has_attention = self.network.config.attention_type != "none"
        if has_attention and isinstance(self.network, nn.Module):
            output = self.network(pixels, output_attentions=True)
            return output.exit_logits, output.attentions
        logits = self.network(pixels).exit_logits
        return tuple(torch.as_tensor(one) for one in logits), None

    def _time(self, pixels: torch.Tensor, rule: ExitConfig) -> tuple[float, float]:
        calls = {
            "adaptive": lambda: self.network.predict_adaptive(pixels, exit_config=rule),
            "plain": lambda: self.network.backbone(pixels),
        }
        with torch.inference_mode():
            seconds = interleaved_medians(calls, rounds=7, seconds_per_round=0.03)
        return 1000 * seconds["adaptive"], 1000 * seconds["plain"]

    def _spotlight(self, pixels: torch.Tensor, mask: torch.Tensor) -> Image.Image:
        """Return an image that is dark blue where the mask is small, and as it was where the mask is large."""
        from ..reporting.plotting import undo_preprocessing

        picture = undo_preprocessing(self.network, pixels[None])[0]
        size = (max(160, picture.shape[0]), max(160, picture.shape[1]))
        light = mask.float().mean(dim=0)
        light = (light - light.min()) / (light.max() - light.min()).clamp(min=1e-6)
        light = F.interpolate(light[None, None].cpu(), size=size, mode="bilinear")[0, 0, :, :, None]
        large = F.interpolate(picture.permute(2, 0, 1)[None], size=size, mode="nearest")[0].permute(1, 2, 0)
        shade = torch.tensor([0.05, 0.10, 0.35])
        mixed = large * (0.15 + 0.85 * light) + shade * (1 - light)
        return Image.fromarray((255 * mixed.clamp(0, 1)).round().byte().numpy())

    def _search(self, folder: Path) -> SavedFrontier:
        """Find the frontier on images of the user, with MACs for costs unless milliseconds were measured."""
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
        known = {label: index for index, label in self.labels.items()}
        strangers = sorted({path.parent.name for path in paths} - set(known))
        if not paths or strangers:
            found = f"folders {strangers[:5]}" if strangers else "no images"
            raise ValueError(
                f"{folder} has {found}; expected images in folders that are named like the network's classes, such as "
                f"{list(known)[:5]}."
            )
        chosen = [paths[row] for row in np.unique(np.linspace(0, len(paths) - 1, MOST_IMAGES, dtype=int))]
        rows = [
            {"pixel_values": self.pixels([_open(path)])[0].cpu(), "labels": known[path.parent.name]} for path in chosen
        ]
        table = collect_exit_logits(self.network, rows, folder.name)
        return SavedFrontier.of(table, self.network.exit_config, CostModel.of(self.network))


def _open(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image.copy()


def _is_export(name: str | Path) -> bool:
    return Path(name, "onnx").is_dir()


def int8_folder(name: str) -> str | None:
    """Return the subfolder of a network that holds its export in INT8, or None."""
    return "int8" if _is_export(Path(name, "int8")) else None


def _sample_files(name: str, data: str | Path | None) -> list[str]:
    """Return images to show: those beside the checkpoint, or some of the user's, spread evenly."""
    for folder in [Path(name, SAMPLES), *([Path(data)] if data is not None else [])]:
        paths = [str(path) for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS]
        if paths:
            return [paths[row] for row in np.unique(np.linspace(0, len(paths) - 1, MOST_SAMPLES, dtype=int))]
    return []


def _find_frontier(name: str) -> SavedFrontier | None:
    """Return the frontier that lies beside the checkpoint, on this machine or on the Hub."""
    path = cached_file(
        name,
        FRONTIER_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else SavedFrontier.load(path)


__all__ = ["DemoNetwork", "ExitView", "ImageView", "int8_folder"]
