# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Every exit's logits on a split, computed once, from which thresholds are searched without the network."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..adaptive import ExitConfig, fall_back
from ..data import sample_digests, tensor_digests
from ..exit_criteria import confidence_of


if TYPE_CHECKING:
    from ..modeling_scan import ScanForImageClassification


@dataclass
class ExitTable:
    """
    What every exit answers on a split.

    Args:
        logits (`np.ndarray` of shape `(n, num_exits, num_labels)`): From shallow to deep, float32.
        labels (`np.ndarray` of shape `(n,)`): The true class indices.
        samples (`np.ndarray` of shape `(n,)`): Which images these are: [`~hf_scan.data.sample_digests`].
        split (`str`): The split's name.
        model (`str`): The weights that answered: [`~ScanForImageClassification.fingerprint`].
    """

    logits: np.ndarray
    labels: np.ndarray
    samples: np.ndarray
    split: str
    model: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_exits(self) -> int:
        return self.logits.shape[1]

    @property
    def deepest(self) -> np.ndarray:
        """The classes that the deepest exit answers, `(n,)`."""
        return self.logits[:, -1].argmax(axis=-1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images and labels, whatever their order."""
        return hashlib.sha256(np.sort(self.samples).tobytes()).hexdigest()

    def columns(self, exit_config: ExitConfig) -> tuple[np.ndarray, np.ndarray]:
        """
        The answers a sample can get, as [`exit_columns`] numbers them.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: scores, and predicted classes, both `(n, num_exits + 1)`.
        """
        exit_logits = torch.from_numpy(self.logits).unbind(dim=1)
        predictions, confidences = exit_columns(exit_logits, exit_config)
        return confidences.numpy(), predictions.numpy()

    def select(self, rows: np.ndarray, split: str | None = None) -> "ExitTable":
        """Some of the samples, by index or by a mask, as a split of another name."""
        return replace(
            self,
            logits=self.logits[rows],
            labels=self.labels[rows],
            samples=self.samples[rows],
            split=split or self.split,
        )

    def halves(self, names: tuple[str, str], seed: int = 0) -> tuple["ExitTable", "ExitTable"]:
        """Two splits of equal size at random. Images that are there twice stay together."""
        unique, which = np.unique(self.samples, return_inverse=True)
        first = np.random.default_rng(seed).permutation(len(unique)) < len(unique) // 2
        return self.select(first[which], names[0]), self.select(~first[which], names[1])

    def save(self, path: str | Path) -> None:
        """Writes the table as one safetensors file."""
        arrays = {"logits": self.logits, "labels": self.labels, "samples": self.samples}
        facts = json.dumps({"split": self.split, "model": self.model})
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"exit_table": facts})

    @classmethod
    def load(cls, path: str | Path) -> "ExitTable":
        """Reads a table that [`~ExitTable.save`] wrote."""
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("exit_table", "null"))
            if facts is None:
                raise ValueError(f"{path} is not a table of exit logits; write one with `ExitTable.save`.")
            return cls(**{name: file.get_tensor(name) for name in ("logits", "labels", "samples")}, **facts)


def exit_columns(
    exit_logits: tuple[torch.Tensor, ...] | list[torch.Tensor], exit_config: ExitConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The answers a sample can get: one column per exit and a last one for the ensemble of the heads that run, or, where
    that is the fallback, for the most confident of them.

    Args:
        exit_logits (`tuple[torch.Tensor]`): One of shape `(batch_size, num_labels)` per exit.
        exit_config ([`ExitConfig`]): Says how exits are scored and which are off. Without thresholds, none is.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: predicted classes and scores, both `(batch_size, num_exits + 1)`.
    """
    thresholds = exit_config.thresholds or [0.0] * len(exit_logits)
    deepest = len(exit_logits) - 1
    seen: list[torch.Tensor] = []
    exits: list[int] = []
    scores = []
    for index, logits in enumerate(exit_logits):
        if index == deepest or thresholds[index] is not None:
            seen.append(logits)
            exits.append(index)
            scores.append(exit_config.score(seen, exits))
        else:
            scores.append(confidence_of(logits))  # which nobody compares with anything
    last = exit_config if exit_config.fallback == "most_confident" else exit_config.update(fallback="ensemble")
    logits, _, confidence = fall_back(last, seen, exits, len(exit_logits))
    predictions = torch.stack([answer.argmax(dim=-1) for answer in (*exit_logits, logits)], dim=1)
    return predictions, torch.stack([*scores, confidence], dim=1)


def collect_exit_logits(
    model: "ScanForImageClassification", dataset: Any, split: str = "search", batch_size: int = 64
) -> ExitTable:
    """
    Runs every exit on a dataset, with a progress bar.

    Args:
        model ([`ScanForImageClassification`]): The network, on any device.
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): Gives dictionaries of `pixel_values` and `labels`
            (or `label`), as for the `Trainer`.
        split (`str`, *optional*, defaults to `"search"`): What the split is called in what is saved.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.

    Returns:
        [`ExitTable`]

    Raises:
        `ValueError`: if the dataset is empty.
    """
    if len(dataset) == 0:
        raise ValueError(f"The {split!r} split is empty; thresholds need samples to be searched on.")
    samples = sample_digests(dataset)
    logits, labels, digests = [], [], []
    was_training = model.training
    model.eval()
    try:
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator)
        for batch in tqdm(loader, desc=f"exit logits of {split}", leave=False):
            if samples is None:
                digests.append(tensor_digests(batch["pixel_values"], batch["labels"]))
            with torch.inference_mode():
                exit_logits = model(batch["pixel_values"].to(model.device, model.dtype)).exit_logits
            logits.append(torch.stack(exit_logits, dim=1).float().cpu())
            labels.append(batch["labels"])
    finally:
        model.train(was_training)
    return ExitTable(
        logits=torch.cat(logits).numpy(),
        labels=torch.cat(labels).numpy(),
        samples=np.concatenate(digests) if samples is None else samples,
        split=split,
        model=model.fingerprint(),
    )
