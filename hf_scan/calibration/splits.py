# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What a split must be like for thresholds to be searched or certified on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..adaptive import ExitConfig
from .exit_table import ExitTable


if TYPE_CHECKING:
    from ..modeling_scan import ScanForImageClassification

# With fewer, one sample is ten points of accuracy and more.
LEAST_SAMPLES = 10
# Datasets hold some images twice. Splits that share more than this were not kept apart.
SHARED_BY_CHANCE = 0.01


def check_usable(table: ExitTable, exit_config: ExitConfig) -> None:
    """
    Raises:
        `ValueError`: if the split is too small, has one class, or its scores are not finite or all equal.
    """
    name = f"The {table.split!r} split"
    if len(table) < LEAST_SAMPLES:
        raise ValueError(
            f"{name} has {len(table)} samples; thresholds need at least {LEAST_SAMPLES}, and better 1,000."
        )
    classes = np.unique(table.labels)
    if len(classes) == 1:
        raise ValueError(
            f"{name} has samples of one class only, {int(classes[0])}; thresholds need samples as they come in use. "
            "Was the split taken from a dataset that is sorted by class?"
        )
    if not np.isfinite(table.logits).all():
        bad = int((~np.isfinite(table.logits).all(axis=(1, 2))).sum())
        raise ValueError(
            f"{name} has logits that are not finite, for {bad} of {len(table)} samples. Check the weights and images."
        )
    scores, _ = table.columns(exit_config)
    if (np.ptp(scores[:, :-1], axis=0) == 0).all():
        raise ValueError(
            f"{name} has the same score for every sample at each exit, so that no threshold can tell them apart. Is "
            "the network trained?"
        )


def check_apart(model: "ScanForImageClassification", tables: Sequence[ExitTable]) -> None:
    """
    Raises:
        `ValueError`: if a table is of other weights than the model's, or of images that the model was trained on, or
            two of them share images.
    """
    fingerprint = model.fingerprint()
    for table in tables:
        if table.model != fingerprint:
            raise ValueError(
                f"The table of the {table.split!r} split is of other weights than the model's: {table.model[:12]}... "
                f"instead of {fingerprint[:12]}... Make one with `collect_exit_logits(model, ...)`."
            )
        check_not_among(table, model.exit_config.trained_on, "The network was trained")
    for index, table in enumerate(tables):
        for other in tables[:index]:
            shared = len(np.intersect1d(table.samples, other.samples))
            if shared > SHARED_BY_CHANCE * min(len(table), len(other)):
                raise ValueError(
                    f"The {other.split!r} and {table.split!r} splits share {shared} images; thresholds have to be "
                    "certified on images that did not choose them."
                )


def check_not_among(table: ExitTable, digests: str | None, what: str) -> None:
    """
    Args:
        table ([`ExitTable`]): The split.
        digests (`str`, *optional*): Of some images that it must not hold, as [`~hf_scan.data.digests_as_text`].
        what (`str`): What was done on those, as the beginning of a sentence.

    Raises:
        `ValueError`: if the split holds more of them than by chance.
    """
    known, remembered = set(table.samples.tolist()), (digests or "").split()
    shared = sum(int(digest, base=16) in known for digest in remembered)
    if shared > SHARED_BY_CHANCE * len(remembered):
        raise ValueError(
            f"{what} on the {table.split!r} split, or a part of it: {shared} of {len(remembered)} images that are "
            "remembered are there, where answers are surer, and more often right, than they will be. Use images that "
            "had no part in it."
        )
