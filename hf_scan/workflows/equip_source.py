# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The trained classifier that [`~hf_scan.equip`] starts from, and whether its classes are those of the images."""

from pathlib import Path
from typing import Any

import torch

from ..model.evaluation_mode import evaluating
from ..model.modeling_scan import ScanForImageClassification
from ..model.provenance import unknown_images
from ..training.collation import collate_rows
from .equip_arguments import EquipArguments
from .model_arguments import load_plain_network, load_plain_run
from .torchvision_source import for_other_classes, load_torchvision, torchvision_name


# Images by which it is seen whether the classes are those that the weights know.
CHECKED_IMAGES = 100


def load_source(arguments: EquipArguments) -> ScanForImageClassification:
    """Return the trained network as it is, with the classes that it knows."""
    if (name := torchvision_name(arguments.model)) is not None:
        return load_torchvision(name, arguments.weights, arguments.image_size)
    settings: dict[str, Any] = {} if arguments.image_size is None else {"image_size": arguments.image_size}
    if arguments.weights == "timm":
        return ScanForImageClassification.from_timm(arguments.model, pretrained=True, **settings)
    if Path(arguments.weights).is_dir():
        plain, trained_on = load_plain_run(arguments.weights, arguments.model)
    else:
        plain = load_plain_network(arguments.model, arguments.weights, image_size=arguments.image_size)
        trained_on = unknown_images(f"weights of {Path(arguments.weights).name}")
    return ScanForImageClassification.from_timm(plain, trained_on=trained_on, **settings)


def for_classes(source: ScanForImageClassification, names: list[str]) -> ScanForImageClassification:
    """Return the network with a new classifier for other classes."""
    if source.config.backbone_source == "torchvision":
        return for_other_classes(source, names)
    return ScanForImageClassification.from_timm(
        source.backbone,
        num_labels=len(names),
        trained_on=source.exit_config.trained_on,
        image_size=source.config.image_size,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )


def name_classes(plain: ScanForImageClassification, names: list[str]) -> None:
    """Call classes as their folders are, where the weights do not name them."""
    if all(str(name).startswith("LABEL_") for name in plain.config.id2label.values()):
        plain.config.id2label = dict(enumerate(names))
        plain.config.label2id = {name: index for index, name in enumerate(names)}


def check_classes(plain: ScanForImageClassification, images: Any, arguments: EquipArguments) -> None:
    """Refuse images whose classes cannot be those of the weights, or not in this order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CHECKED_IMAGES].tolist()
    batch = collate_rows([images[row] for row in order])
    with evaluating(plain), torch.inference_mode():
        answers = plain.backbone(batch["pixel_values"]).argmax(dim=-1)
    accuracy = float((answers == batch["labels"]).float().mean())
    chance = 1 / plain.num_labels
    if accuracy < chance + 0.1 * (1 - chance):
        raise ValueError(
            f"The network is right on {accuracy:.1%} of {len(order)} images of {arguments.data}, hardly more than by "
            f"chance among {plain.num_labels} classes; expected images of its own classes, in the order of the "
            "folders' names. Rename the folders, or correct `weights`."
        )


__all__ = ["check_classes", "for_classes", "load_source", "name_classes"]
