# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Features of a frozen backbone, computed once and stored, to train heads without running the backbone again."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..data.digests import sample_digests
from ..model.evaluation_mode import evaluating
from .output_dirs import check_space, named_full_disk


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


class StageFeatures(Dataset[dict[str, Any]]):
    """
    A dataset of the features of a split, stored on disk. [`ScanTrainer`] trains and evaluates on it as on images.

    Args:
        folder (`str` or `Path`): Where [`extract_stage_features`] wrote them.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments
    >>> from hf_scan.training.stage_features import extract_stage_features

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(8)]
    >>> features = extract_stage_features(model, images, "runs/example/features")
    >>> args = ScanTrainingArguments(output_dir="runs/example", max_steps=1, save_strategy="no", freeze_backbone=True)
    >>> result = ScanTrainer(model, args, train_dataset=features).train()
    {'train_runtime': ...}
    ```
    """

    def __init__(self, folder: str | Path) -> None:
        files = sorted(Path(folder).glob("stage_*.npy"))
        labels = Path(folder, "labels.npy")
        if not files or not labels.is_file():
            raise FileNotFoundError(
                f"{folder} holds no features of a split; write them with `extract_stage_features`."
            )
        self.folder = Path(folder)
        self.stages = [_load(file, "r") for file in files]
        self.labels = _load(labels)
        samples = Path(folder, "samples.npy")
        # Digests of the images, where they are known.
        self.samples = _load(samples) if samples.is_file() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)  # a copy of the arrays would go to every worker

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = tuple(torch.from_numpy(stage[index].copy()) for stage in self.stages)
        return {"stage_features": features, "labels": int(self.labels[index])}


def _load(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        array: np.ndarray = np.load(file, mmap_mode=mmap_mode)
    except (ValueError, EOFError, OSError) as error:
        raise OSError(
            f"The features {file} cannot be read ({error}). Remove {file.parent}, and write them again with "
            "`extract_stage_features`."
        ) from error
    return array


@torch.inference_mode()
def extract_stage_features(
    model: "ScanForImageClassification",
    dataset: Any,
    folder: str | Path,
    batch_size: int = 64,
    num_workers: int = 0,
) -> StageFeatures:
    """
    Run the backbone once over a dataset, with a progress bar, and store what every stage returns. This pays off where
    the backbone is frozen and the images are the same in every epoch, that is, without augmentation.

    Args:
        model ([`ScanForImageClassification`]): The network, on any device. It is run in evaluation mode.
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): Gives dictionaries of `pixel_values` and `labels`.
        folder (`str` or `Path`): A folder to write to, which must not be there or be empty.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        num_workers (`int`, *optional*, defaults to 0): Processes that read images.

    Returns:
        [`StageFeatures`]

    Raises:
        `ValueError`: if the dataset is empty or the folder is not, or a stage returns no map.
        `OSError`: if there is not enough space. Nothing stays behind.
    """
    folder = Path(folder)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty; expected images.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder for the features, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with evaluating(model), named_full_disk(folder, "nothing is left there"):
            _write_features(model, dataset, folder, batch_size, num_workers)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return StageFeatures(folder)


def _write_features(
    model: "ScanForImageClassification", dataset: Any, folder: Path, batch_size: int, num_workers: int
) -> None:
    arrays: list[np.memmap] = []
    labels: list[np.ndarray] = []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator, num_workers=num_workers)
    for batch in tqdm(loader, desc="features of the frozen stages", leave=False):
        features = model.extract_features(batch["pixel_values"].to(model.device, model.dtype))
        if not arrays:
            check_space(
                folder,
                4 * len(dataset) * sum(feature[0].numel() for feature in features),
                f"The features of {len(dataset)} images",
                "Train on the images themselves, with smaller ones, or with fewer `exit_points`.",
            )
            arrays = [
                np.lib.format.open_memmap(
                    folder / f"stage_{index:02}.npy", "w+", np.float32, (len(dataset), *feature.shape[1:])
                )
                for index, feature in enumerate(features)
            ]
        start = batch_size * len(labels)
        for array, feature in zip(arrays, features):
            array[start : start + len(feature)] = feature.float().cpu().numpy()
        labels.append(batch["labels"].numpy())
    for array in arrays:
        array.flush()
    samples = sample_digests(dataset)
    if samples is not None:
        np.save(folder / "samples.npy", samples)
    np.save(folder / "labels.npy", np.concatenate(labels))  # last: without it, the folder is no split
