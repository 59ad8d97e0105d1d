# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Check that thresholds can be searched or certified on a split."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom
from transformers.utils import logging

from ..data.digests import sample_digests, shared_with
from ..model.exit_config import ExitConfig
from ..model.provenance import known_parts, unknown_parts
from .exit_table import ExitTable


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


logger = logging.get_logger(__name__)

# With fewer, one sample counts ten points of accuracy or more.
LEAST_SAMPLES = 10
# Datasets contain some images twice. Splits that share a larger fraction were not kept apart.
SHARED_BY_CHANCE = 0.01
# Significance level of the test for shared images where the digests of only some are known.
UNLIKELY = 0.001


def check_usable(table: ExitTable, exit_config: ExitConfig) -> None:
    """
    Check that thresholds can be found on a split.

    Raises:
        `ValueError`: if the split is too small, has a single class or labels that are out of range, or its scores are
            not finite, not in [0, 1] or all equal.
    """
    name = f"The {table.split!r} split"
    if len(table) < LEAST_SAMPLES:
        raise ValueError(
            f"{name} has {len(table)} samples; thresholds need at least {LEAST_SAMPLES}, preferably 1,000."
        )
    classes = np.unique(table.labels)
    if len(classes) == 1:
        which = "" if table.multi_label else f", {int(classes[0])}"
        raise ValueError(
            f"{name} has samples of one class only{which}; expected the classes that occur in use. Was the split "
            "taken from a dataset that is sorted by class?"
        )
    if not table.multi_label and (classes[0] < 0 or classes[-1] >= table.logits.shape[2]):
        raise ValueError(
            f"{name} has labels from {int(classes[0])} to {int(classes[-1])}, and the network has "
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
            f"on the {table.split!r} split; expected scores in [0, 1], as thresholds are. Rescale them."
        )
    if (np.ptp(scores[:, :-1], axis=0) == 0).all():
        hint = TEMPERATURES_HELP if (scores[:, :-1] == 1).all() else "Is the network trained?"
        raise ValueError(
            f"{name} has the same score for every sample at each exit, so that no threshold can separate samples. "
            + hint
        )


# Share of scores at an exit that are exactly 1.0 above which a hint is given.
SATURATED = 0.5


def saturated(table: ExitTable, exit_config: ExitConfig) -> str | None:
    """Return a hint if most scores of an early exit are exactly 1.0, so that no threshold can separate them."""
    scores, _ = table.columns(exit_config)
    shares = (scores[:, : table.num_exits - 1] >= 1).mean(axis=0)
    exits = [f"exit {index} ({share:.0%})" for index, share in enumerate(shares) if share > SATURATED]
    if not exits:
        return None
    return (
        f"Most scores on the {table.split!r} split are exactly 1.0 at {', '.join(exits)}, and no threshold can "
        f"separate these samples. {TEMPERATURES_HELP}"
    )


TEMPERATURES_HELP = (
    "Pass `temperatures=[...]`, a number above 1 for each exit, such as those that minimise the loss of the logits "
    "divided by them on held-out images."
)


def check_apart(model: "ScanForImageClassification", tables: Sequence[ExitTable]) -> None:
    """
    Check that tables belong to a model, and that their images are disjoint from each other and from those it was
    trained on. A warning is logged if the latter are not all known.

    Raises:
        `ValueError`: if a table was computed with other weights or has other exits, holds images that the model was
            trained on, or shares images with another table.
    """
    fingerprint = model.fingerprint()
    for table in tables:
        if table.model != fingerprint:
            raise ValueError(
                f"The table of the {table.split!r} split was computed with other weights than the model's: "
                f"{table.model[:12]}... instead of {fingerprint[:12]}... Compute it with "
                "`collect_exit_logits(model, ...)`."
            )
        if table.logits.shape[1:] != (model.num_exits, model.config.num_labels):
            raise ValueError(
                f"The table of the {table.split!r} split has {table.num_exits} exits with {table.logits.shape[2]} "
                f"labels, and the network has {model.num_exits} with {model.config.num_labels}. Compute it with "
                "`collect_exit_logits(model, ...)`."
            )
        check_not_among(table, model.exit_config.trained_on, "The network was trained")
    for index, table in enumerate(tables):
        for other in tables[:index]:
            shared = len(np.intersect1d(table.samples, other.samples))
            if shared > SHARED_BY_CHANCE * min(len(table), len(other)):
                raise ValueError(
                    f"The {other.split!r} and {table.split!r} splits share {shared} images; expected disjoint splits, "
                    "as thresholds are certified on images that did not choose them."
                )
    trained_on = model.exit_config.trained_on
    if unknown := unknown_parts(trained_on) or ([] if trained_on else ["no training of its weights is recorded"]):
        logger.warning(
            f"The network was trained on images that cannot be known ({', '.join(unknown)}). If images of the "
            f"{tables[0].split!r} split are among them, accuracy is overestimated and no guarantee holds. Use images "
            "that it cannot have been trained on (`--search_split` of the examples names a split)."
        )


def check_not_among(table: ExitTable, digests: str | None, what: str) -> None:
    """
    Check that a split does not hold images that had another role.

    Args:
        table ([`ExitTable`]): The split.
        digests (`str`, *optional*): Digests of those images, as [`~hf_scan.data.some_digests`] returns them.
        what (`str`): Their role, as the beginning of a sentence, such as `"The network was trained"`.

    Raises:
        `ValueError`: if the split holds significantly more of them than by chance.
    """
    for part in known_parts(digests):
        _check_not_among_part(table.samples, table.split, part, what)


def check_unseen(images: Any, split: str, digests: str | None, what: str) -> None:
    """
    As [`check_not_among`], of images that no network has answered yet: before the work, where their digests are known
    without it.

    Args:
        images (`datasets.Dataset` or `torch.utils.data.Dataset`): The split.
        split (`str`): Its name.
        digests, what: As for [`check_not_among`].
    """
    if not (parts := known_parts(digests)):
        return
    if (samples := sample_digests(images)) is None:
        return
    for part in parts:
        _check_not_among_part(samples, split, part, what)


def _check_not_among_part(samples: np.ndarray, split: str, digests: str, what: str) -> None:
    shared, at_most = shared_with(samples, digests)
    if binom.sf(shared - 1, len(samples), min(1.0, SHARED_BY_CHANCE * at_most / len(samples))) < UNLIKELY:
        raise ValueError(
            f"{what} on the {split!r} split, or a part of it: {shared} images whose digests are recorded are in it, "
            f"of {at_most:.0f} if all of it was, so accuracy would be overestimated. Use other images, such as those "
            "that the training kept aside."
        )


def deduplicated(table: ExitTable, other: ExitTable | None = None) -> ExitTable:
    """Return a split without repeated images and those of another split, as a test needs independent samples."""
    first = np.zeros(len(table), dtype=bool)
    first[np.unique(table.samples, return_index=True)[1]] = True
    return table.select(first if other is None else first & ~np.isin(table.samples, other.samples))
