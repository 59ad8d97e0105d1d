"""Checkpoints that several files of tests save and load."""

import torch

from hf_scan import ExitConfig, ScanForImageClassification

from ..conftest import random_scan_model


THRESHOLDS = ExitConfig(thresholds=[0.5, 0.4], search={"method": "exact"}, costs={"machine": "x"})


def saved(folder, seed: int = 0, thresholds: ExitConfig = THRESHOLDS, **kwargs) -> ScanForImageClassification:
    model = random_scan_model(seed)
    model.exit_config = thresholds
    model.save_pretrained(folder, **kwargs)
    return model


def load(folder, **kwargs) -> ScanForImageClassification:
    return ScanForImageClassification.from_pretrained(folder, **kwargs)


def change_weights(model) -> None:
    with torch.no_grad():
        model.backbone.fc.weight.add_(1)
