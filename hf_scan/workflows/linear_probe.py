# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A new classifier for other classes on a network that stays as it is."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..model.evaluation_mode import evaluating
from ..model.modeling_scan import ScanForImageClassification


PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 5  # every fifth image judges the penalties


def fit_classifier(
    model: ScanForImageClassification, dataset: Any, batch_size: int = 64, num_workers: int = 0
) -> float:
    """
    Fit the backbone's last layer to other classes, by logistic regression on what the frozen rest makes of the images.
    The penalty on its weights is the one that is best on a fifth of them; then all are fitted.

    Args:
        model ([`ScanForImageClassification`]): Its `backbone`'s classifier is changed, and nothing else.
        dataset (`datasets.Dataset`): Transformed images with labels, without augmentation.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        num_workers (`int`, *optional*, defaults to 0): Processes that read images.

    Returns:
        `float`: the accuracy on the fifth that was held out.

    Raises:
        `ValueError`: if the classifier is not a linear layer on a feature for each image.
    """
    classifier = _classifier_of(model)
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"The classifier of {model.config.backbone!r} is a {type(classifier).__name__}; expected a linear layer. "
            "Train the network on these classes first."
        )
    features, labels = _features(model, dataset, batch_size, num_workers)
    mean, scale = features.mean(dim=0), features.std()
    features = (features - mean) / scale
    held_out = torch.arange(len(labels)) % HELD_OUT == 0
    accuracies = []
    for penalty in PENALTIES:
        weight, bias = _logistic_regression(features[~held_out], labels[~held_out], model.num_labels, penalty)
        answers = (features[held_out] @ weight.T + bias).argmax(dim=1)
        accuracies.append(float((answers == labels[held_out]).float().mean()))
    best = max(range(len(PENALTIES)), key=accuracies.__getitem__)
    weight, bias = _logistic_regression(features, labels, model.num_labels, PENALTIES[best])
    with torch.no_grad():
        classifier.weight.copy_(weight / scale)
        classifier.bias.copy_(bias - weight @ (mean / scale))
    return accuracies[best]


def _classifier_of(model: ScanForImageClassification) -> Any:
    """Return the last layer of a backbone, which timm's tell, and those of other libraries have at the end."""
    if hasattr(model.backbone, "get_classifier"):
        return model.backbone.get_classifier()
    *_, last = (module for module in model.backbone.modules() if not list(module.children()))
    return last


@torch.inference_mode()
def _features(
    model: ScanForImageClassification, dataset: Any, batch_size: int, num_workers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = [], []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator, num_workers=num_workers)
    with evaluating(model):
        for batch in tqdm(loader, desc="features for the classifier", leave=False):
            deepest = model.extract_features(batch["pixel_values"])[-1]
            feature = model.run_backbone_head(deepest, pre_logits=True)
            features.append(feature.float().cpu())
            labels.append(batch["labels"])
    return torch.cat(features), torch.cat(labels)


def _logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, num_labels: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = features.clone(), labels.clone()  # made in inference mode
    weight = torch.zeros(num_labels, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(features @ weight.T + bias, labels) + penalty * weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


__all__ = ["fit_classifier"]
