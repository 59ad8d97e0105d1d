# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Compute every exit's logits on a split once, so that thresholds are searched without the network: [`ExitTable`]."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..data.digests import sample_digests, tensor_digests
from ..model.evaluation_mode import evaluating
from ..model.exit_config import ExitConfig
from ..model.exit_rule import AdaptiveOutput, answers_of, apply_exit_rule, exit_columns, label_set_ids
from ..model.named_errors import named_full_disk
from ..model.problem_type import MULTI_LABEL


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


@dataclass
class ExitTable:
    """
    A table that holds every exit's logits on a split.

    Args:
        logits (`np.ndarray` of shape `(n, num_exits, num_labels)`): Logits from shallow to deep, float32.
        labels (`np.ndarray` of shape `(n,)`): The true class indices.
        samples (`np.ndarray` of shape `(n,)`): Digests that identify the images: [`~hf_scan.data.sample_digests`].
        split (`str`): The split's name.
        model (`str`): Fingerprint of the weights: [`~ScanForImageClassification.fingerprint`].
        multi_label (`bool`, *optional*, defaults to `False`): Whether an image has several labels. `labels` then holds
            [`~hf_scan.model.exit_rule.label_set_ids`]: an answer is right if all its labels are.

    Raises:
        `ValueError`: if the arrays do not belong together.
    """

    logits: np.ndarray
    labels: np.ndarray
    samples: np.ndarray
    split: str
    model: str
    multi_label: bool = False

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.logits.ndim != 3 or len(self.logits) != n or self.samples.shape != (n,):
            raise ValueError(
                f"`logits` {self.logits.shape}, `labels` {self.labels.shape} and `samples` {self.samples.shape} do "
                "not belong together; expected (n, num_exits, num_labels), (n,) and (n,)."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_exits(self) -> int:
        return self.logits.shape[1]

    @property
    def deepest(self) -> np.ndarray:
        """Return the deepest exit's predictions, `(n,)`: classes or, with several labels, the numbers of the sets."""
        if self.multi_label:
            return label_set_ids(torch.from_numpy(self.logits[:, -1] > 0)).numpy()
        return self.logits[:, -1].argmax(axis=-1)

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the set of images. It does not depend on their order or on repetitions."""
        return hashlib.sha256(np.unique(self.samples).tobytes()).hexdigest()

    def columns(self, exit_config: ExitConfig) -> tuple[np.ndarray, np.ndarray]:
        """
        Return the scores and predictions of every answer that a sample can get, one a column as in [`exit_columns`].

        Returns:
            `tuple[np.ndarray, np.ndarray]`: scores and predicted classes, both of shape `(n, num_exits + 1)`.
        """
        exit_logits = torch.from_numpy(self.logits).unbind(dim=1)
        predictions, confidences = exit_columns(exit_logits, exit_config)
        return confidences.numpy(), predictions.numpy()

    @property
    def baseline_accuracy(self) -> float:
        """Return the deepest exit's accuracy, in [0, 1]."""
        return float((self.deepest == self.labels).mean())

    def answers(self, exit_config: ExitConfig) -> AdaptiveOutput:
        """Return the exit rule's answers, one a sample."""
        return apply_exit_rule(torch.from_numpy(self.logits).unbind(dim=1), exit_config)

    def predictions(self, exit_config: ExitConfig) -> np.ndarray:
        """Return the predictions of the exit rule's answers, `(n,)`."""
        return answers_of(self.answers(exit_config).logits, exit_config).numpy()

    def exit_indices(self, exit_config: ExitConfig) -> np.ndarray:
        """Return where each sample exits, `(n,)`; `num_exits` for one that the fallback answers."""
        return self.answers(exit_config.replace(fallback="ensemble")).exit_index.numpy()

    def exit_shares(self, exit_config: ExitConfig) -> list[float]:
        """Return the share of samples that exit at each exit and, last, of those that the fallback answers."""
        counts = np.bincount(self.exit_indices(exit_config), minlength=self.num_exits + 1)
        return (counts / len(self)).tolist()

    def select(self, rows: np.ndarray, split: str | None = None) -> "ExitTable":
        """Return some of the samples, by index or by a mask, optionally as a split of another name."""
        return replace(
            self,
            logits=self.logits[rows],
            labels=self.labels[rows],
            samples=self.samples[rows],
            split=split or self.split,
        )

    def halves(self, names: tuple[str, str], seed: int = 0) -> tuple["ExitTable", "ExitTable"]:
        """Return two random splits of equal size. Copies of an image are put into the same one."""
        unique, which = np.unique(self.samples, return_inverse=True)
        first = np.random.default_rng(seed).permutation(len(unique)) < len(unique) // 2
        return self.select(first[which], names[0]), self.select(~first[which], names[1])

    def save(self, path: str | Path) -> None:
        """
        Write the table as one safetensors file, whose folder is created if it is missing.

        Raises:
            `OSError`: if it cannot be written, as when the disk is full.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        arrays = {"logits": self.logits, "labels": self.labels, "samples": self.samples}
        facts = json.dumps({"split": self.split, "model": self.model, "multi_label": self.multi_label})
        with named_full_disk(path, "what it holds is incomplete"):
            save_file(
                {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"exit_table": facts}
            )

    @classmethod
    def load(cls, path: str | Path) -> "ExitTable":
        """
        Read a table that [`~ExitTable.save`] wrote.

        Raises:
            `ValueError`: if the file does not hold a whole table.
            `FileNotFoundError`: if there is no file.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["exit_table"])
                return cls(**{name: file.get_tensor(name) for name in ("logits", "labels", "samples")}, **facts)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not hold a whole table of exit logits ({error}). Write one with `ExitTable.save`."
            ) from error


def collect_exit_logits(
    model: "ScanForImageClassification", dataset: Any, split: str = "search", batch_size: int = 64
) -> ExitTable:
    """
    Run every exit on a dataset, with a progress bar.

    Args:
        model ([`ScanForImageClassification`]): The network, on any device.
        dataset (`datasets.Dataset`, `torch.utils.data.Dataset` or `DataLoader`): Its rows are dictionaries of
            `pixel_values` and `labels` (or `label`), as for the `Trainer`, or pairs of an image as a tensor and its
            label. With several labels an image, its labels are 1 for each that it has and 0 for the others. The
            dataset of a `DataLoader` is read in order, with its `collate_fn`.
        split (`str`, *optional*, defaults to `"search"`): Name of the split.
        batch_size (`int`, *optional*, defaults to 64): Number of images in a batch.

    Returns:
        [`ExitTable`]

    Raises:
        `ValueError`: if the dataset is empty, or its rows lack `pixel_values` or class indices.
        `TypeError`: if it is not a dataset with a length, or its rows are neither dictionaries nor pairs.
    """
    collate: Callable[[Any], Any] | None = None
    if isinstance(dataset, DataLoader):
        dataset, collate = dataset.dataset, dataset.collate_fn
    multi_label = model.config.problem_type == MULTI_LABEL
    pairs = _check_rows(dataset, split)
    if collate is None:
        collate = default_collate if pairs else default_data_collator
    samples = sample_digests(dataset)
    logits, labels, digests = [], [], []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    # An exported network has no modes.
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext(), torch.inference_mode():
        for batch in tqdm(loader, desc=f"exit logits of {split}", leave=False):
            pixel_values, classes = _images_and_labels(batch, split, model.config.num_labels if multi_label else None)
            if samples is None:
                digests.append(tensor_digests(pixel_values, classes))
            exit_logits = model(pixel_values.to(model.device, model.dtype)).exit_logits
            logits.append(torch.stack(exit_logits, dim=1).float().cpu())
            labels.append(classes)
    return ExitTable(
        logits=torch.cat(logits).numpy(),
        labels=torch.cat(labels).numpy(),
        samples=np.concatenate(digests) if samples is None else samples,
        split=split,
        model=model.fingerprint(),
        multi_label=multi_label,
    )


def _check_rows(dataset: Any, split: str) -> bool:
    """Check the first row, and return whether it is a pair of an image and its label."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, dict)):
        raise TypeError(
            f"The {split!r} split is a {type(dataset).__name__}; expected a dataset with a length, whose rows are "
            "dictionaries of `pixel_values` and `labels`, or an `ExitTable`."
        )
    if len(dataset) == 0:
        raise ValueError(f"The {split!r} split is empty; expected samples to search thresholds on.")
    row = dataset[0]
    pair = isinstance(row, (tuple, list)) and len(row) == 2
    if pair:
        image, label = row
        if not isinstance(image, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"The {split!r} split has pairs of a {type(image).__name__} and a label; expected the image as a "
                "tensor. Transform the images with the image processor first."
            )
    elif isinstance(row, Mapping):
        label = row.get("labels", row.get("label"))
        if "pixel_values" not in row or label is None:
            raise ValueError(
                f"The {split!r} split has rows of {sorted(row)}; expected `pixel_values` and `labels`. Transform the "
                "images with the image processor first, as for the `Trainer`."
            )
    else:
        raise TypeError(
            f"The {split!r} split has rows of type {type(row).__name__}; expected dictionaries, or pairs of an image "
            "and its label."
        )
    if isinstance(label, str):
        raise ValueError(
            f"The {split!r} split has labels such as {label!r}; expected class indices. `model.config.label2id` maps "
            "names to them."
        )
    return pair


def _images_and_labels(batch: Any, split: str, num_labels: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's images and class indices, `(batch_size,)`; with several labels, the numbers of the sets."""
    if isinstance(batch, Mapping):
        images, labels = batch["pixel_values"], batch["labels"] if "labels" in batch else batch["label"]
    else:
        images, labels = batch
    labels = torch.as_tensor(labels)
    if num_labels is not None:
        if labels.shape != (len(images), num_labels) or not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                f"The {split!r} split has labels of shape {tuple(labels.shape)} for {len(images)} images; expected "
                f"{num_labels} for each, 1 for a label that it has and 0 for the others."
            )
        return images, label_set_ids(labels == 1)
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype == torch.bool or labels.is_floating_point():
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(
            f"The {split!r} split has labels of type {kind} and shape {tuple(labels.shape)} for {len(images)} images; "
            "expected one class index for each."
        )
    return images, labels
