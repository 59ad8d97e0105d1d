"""Samples that several files of tests share."""

import torch
from transformers import TrainingArguments

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainingArguments


def rows(count: int, seed: int = 0) -> list[dict]:
    """Images whose class can be seen: its colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    pixels += torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(9))[labels] * 3
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels)]


def fresh_model() -> ScanForImageClassification:
    torch.manual_seed(0)
    return ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=5, image_size=16))


def arguments(tmp_path, **kwargs) -> ScanTrainingArguments:
    kwargs = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 2, "save_strategy": "no", **kwargs}
    return ScanTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], **kwargs)


def plain_arguments(tmp_path, **kwargs) -> TrainingArguments:
    kwargs = {"max_steps": 3, "save_strategy": "no", **kwargs}
    return TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], **kwargs)
