# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What a split must be like for thresholds to be searched or certified on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binom
from transformers.utils import logging

from ..data.digests import shared_with
from ..model.exit_config import ExitConfig
from ..model.provenance import known_parts, unknown_parts
from .exit_table import ExitTable


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


logger = logging.get_logger(__name__)

# With fewer, one sample is ten points of accuracy and more.
LEAST_SAMPLES = 10
# Datasets hold some images twice. Splits that share more than this were not kept apart.
SHARED_BY_CHANCE = 0.01
# Where only some images of a split are known: how unlikely it must be that so many of these are shared by chance.
UNLIKELY = 0.001


def check_usable(table: ExitTable, exit_config: ExitConfig) -> None:
    """
    Raises:
        `ValueError`: if the split is too small, has one class or labels that the network does not know, or its scores
            are not finite, not in [0, 1] or all equal.
    """
    name = f"The {table.split!r} split"
    if len(table) < LEAST_SAMPLES:
        raise ValueError(
            f"{name} has {len(table)} samples; thresholds need at least {LEAST_SAMPLES}, and better 1,000."
        )
    classes = np.unique(table.labels)
    if len(classes) == 1:
        which = "" if table.multi_label else f", {int(classes[0])}"
        raise ValueError(
            f"{name} has samples of one class only{which}; thresholds need samples as they come in use. "
            "Was the split taken from a dataset that is sorted by class?"
        )
    if not table.multi_label and (classes[0] < 0 or classes[-1] >= table.logits.shape[2]):
        raise ValueError(
            f"{name} has labels from {int(classes[0])} to {int(classes[-1])}, and the network knows "
            f"{table.logits.shape[2]} classes; expected indices from 0 to {table.logits.shape[2] - 1}."
        )
    if not np.isfinite(table.logits).all():
        bad = int((~np.isfinite(table.logits).all(axis=(1, 2))).sum())
        raise ValueError(
            f"{name} has logits that are not finite, for {bad} of {len(table)} samples. Check the weights and images."
        )
    scores, _ = table.columns(exit_config)
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(
            f"The exit criterion {exit_config.criterion!r} gives scores from {scores.min():.3g} to {scores.max():.3g} "
            f"on the {table.split!r} split; thresholds are in [0, 1], so bring them there."
        )
    if (np.ptp(scores[:, :-1], axis=0) == 0).all():
        hint = TEMPERATURES_HELP if (scores[:, :-1] == 1).all() else "Is the network trained?"
        raise ValueError(
            f"{name} has the same score for every sample at each exit, so that no threshold can tell them apart. "
            + hint
        )


# Of scores that are exactly 1.0 at an exit, above which it is worth a word.
SATURATED = 0.5


def saturated(table: ExitTable, exit_config: ExitConfig) -> str | None:
    """Return a hint where most scores of an early exit are exactly 1.0, which no threshold can tell apart."""
    scores, _ = table.columns(exit_config)
    shares = (scores[:, : table.num_exits - 1] >= 1).mean(axis=0)
    exits = [f"exit {index} ({share:.0%})" for index, share in enumerate(shares) if share > SATURATED]
    if not exits:
        return None
    return (
        f"Most scores on the {table.split!r} split are exactly 1.0 at {', '.join(exits)}, and no threshold can tell "
        f"these samples apart. {TEMPERATURES_HELP}"
    )


TEMPERATURES_HELP = (
    "Pass `temperatures=[...]`, a number above 1 for each exit, such as those that minimise the loss of the logits "
    "divided by them on held-out images."
)


def check_apart(model: "ScanForImageClassification", tables: Sequence[ExitTable]) -> None:
    """
    Raises:
        `ValueError`: if a table is of other weights than the model's or has other exits, or is of images that the
            model was trained on, or two of them share images.
    """
    fingerprint = model.fingerprint()
    for table in tables:
        if table.model != fingerprint:
            raise ValueError(
                f"The table of the {table.split!r} split is of other weights than the model's: {table.model[:12]}... "
                f"instead of {fingerprint[:12]}... Make one with `collect_exit_logits(model, ...)`."
            )
        if table.logits.shape[1:] != (model.num_exits, model.config.num_labels):
            raise ValueError(
                f"The table of the {table.split!r} split has {table.num_exits} exits with {table.logits.shape[2]} "
                f"labels, and the network has {model.num_exits} with {model.config.num_labels}."
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
    trained_on = model.exit_config.trained_on
    if unknown := unknown_parts(trained_on) or ([] if trained_on else ["no training of its weights is recorded"]):
        logger.warning(
            f"The network was trained on images that cannot be known ({', '.join(unknown)}). If images of the "
            f"{tables[0].split!r} split are among them, accuracy there is overestimated and no guarantee holds. Use "
            "images that those who trained it cannot have had (`--search_split` of the examples names a split)."
        )


def check_not_among(table: ExitTable, digests: str | None, what: str) -> None:
    """
    Args:
        table ([`ExitTable`]): The split.
        digests (`str`, *optional*): Of images that it must not hold, as [`~hf_scan.data.some_digests`].
        what (`str`): What was done on those, as the beginning of a sentence.

    Raises:
        `ValueError`: if the split holds more of them than by chance.
    """
    for part in known_parts(digests):
        _check_not_among_part(table, part, what)


def _check_not_among_part(table: ExitTable, digests: str, what: str) -> None:
    shared, at_most = shared_with(table.samples, digests)
    if binom.sf(shared - 1, len(table), min(1.0, SHARED_BY_CHANCE * at_most / len(table))) < UNLIKELY:
        raise ValueError(
            f"{what} on the {table.split!r} split, or a part of it: {shared} images that are remembered are there, of "
            f"{at_most:.0f} that would be if all were, and answers to them are surer, and more often right, than they "
            "will be. Use images that had no part in it."
        )


def deduplicated(table: ExitTable, other: ExitTable | None = None) -> ExitTable:
    """A split without images that are there twice or in another one: a test counts each as one of many at random."""
    first = np.zeros(len(table), dtype=bool)
    first[np.unique(table.samples, return_index=True)[1]] = True
    return table.select(first if other is None else first & ~np.isin(table.samples, other.samples))
