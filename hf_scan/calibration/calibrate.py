# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find an [`ExitConfig`] for a target on a held-out split."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers.utils import logging

from ..costs.cost_model import CostModel
from ..data.digests import digests_as_text
from ..model.exit_config import ExitConfig
from ..model.exit_rule import num_answers
from ..model.problem_type import for_problem
from .certify import CannotCertifyError, Certificate, RiskBound, certify_answers, check_bound, samples_needed
from .exit_table import ExitTable, collect_exit_logits
from .frontier import as_thresholds
from .genetic import genetic_search
from .monitor import count_answers
from .request import ACCURACY_TARGETS, check_roles, check_target
from .splits import check_apart, check_not_among, check_usable, deduplicated, saturated
from .target import policies_on_target


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


logger = logging.get_logger(__name__)

# Bins of equal width over [0, 1] in which the reference counts confidences.
CONFIDENCE_BINS = 20


def calibrate(
    model: "ScanForImageClassification",
    dataset: Any,
    *,
    max_accuracy_drop: float | None = None,
    min_accuracy: float | None = None,
    max_latency_ms: float | None = None,
    latency: Literal["mean", "p95"] = "mean",
    max_macs: float | None = None,
    speedup: float | None = None,
    accuracy_margin: float | None = None,
    guarantee: RiskBound | None = None,
    certify_dataset: Any = None,
    batch_size: int = 1,
    fallback: Literal["ensemble", "deepest", "most_confident"] = "ensemble",
    criterion: str | Callable[..., torch.Tensor] = "confidence",
    temperatures: list[float | int] | None = None,
    split: str = "search",
    **search_kwargs: Any,
) -> ExitConfig:
    """
    Find thresholds on a held-out split, which neither training nor the final test uses: the cheapest that meet a
    target for the accuracy, or the most accurate that meet a target for the cost. Exits that cost more than they save
    are switched off.

    Costs are the milliseconds that [`~hf_scan.measure_costs`] measured where `model.exit_config.costs` holds them, and
    MACs otherwise; the result's `search["cost_unit"]` says which. Without a target, the paper's genetic search weighs
    accuracy against cost.

    Thresholds tuned on one split are optimistic. A target for the accuracy is therefore one for the expected accuracy
    on other images, by cross-fitting ([`least_accuracy_to_ask`]), and the accuracy on the split itself is no lower. In
    expectation means that it is missed about as often as it is exceeded. A `guarantee` bounds how often it is missed.

    A warning is logged if the thresholds found are slower than the plain network, and if most scores are exactly 1.0,
    so that no threshold can separate samples and `temperatures` are needed.

    Args:
        model ([`ScanForImageClassification`]): The trained network.
        dataset (`datasets.Dataset` or [`ExitTable`]): Transformed images with labels, or logits that were computed
            before.
        max_accuracy_drop (`float`, *optional*): Largest drop in accuracy against the deepest exit, in points, e.g.
            0.5.
        min_accuracy (`float`, *optional*): Lowest accuracy, in [0, 1].
        max_latency_ms (`float`, *optional*): Largest latency of an image, in milliseconds. Needs measured costs.
        latency (`str`, *optional*, defaults to `"mean"`): Whether `max_latency_ms` bounds the `"mean"` over the images
            or `"p95"`, the 95th percentile.
        max_macs (`float`, *optional*): Largest mean number of MACs for an image, e.g. 20e6.
        speedup (`float`, *optional*): Smallest speed-up over the plain backbone, e.g. 1.5.
        accuracy_margin (`float`, *optional*): The least points to keep above the target for the accuracy on this
            split. Cross-fitting keeps as many as the choice of thresholds needs. Where the split has chosen the exits
            too, [`search_exits`] says how many both choices need. Defaults to the margin of the model's present
            thresholds, if they were found on the same images.
        guarantee ([`RiskBound`], *optional*): A bound to certify on images that did not choose the thresholds. Of the
            thresholds that meet the target, the cheapest that pass are returned; with a target for the cost, the most
            accurate. It may be given without a target.
        certify_dataset (`datasets.Dataset` or [`ExitTable`], *optional*): The images to certify on. Defaults to a
            random half of `dataset`, which the search then does not use.
        batch_size (`int`, *optional*, defaults to 1): The batch size that measured costs are taken for. One of the
            sizes measured.
        fallback, criterion, temperatures (*optional*): As in [`ExitConfig`]. With several labels an image, the
            criterion is `"label_confidence"`, and an answer counts as right if all its labels are.
        split (`str`, *optional*, defaults to `"search"`): Name of the split in the result.
        search_kwargs: Arguments of [`genetic_search`], where no target is given: `beta`, `seed`, `generations` and so
            on. The baseline is the deepest exit's accuracy on the split.

    Returns:
        [`ExitConfig`]: to be set as `model.exit_config`. Its `search` records how the thresholds were found, its
        `guarantee` what was certified.

    Raises:
        `ValueError`: if the target is infeasible (the message gives the closest achievable value); if the split is too
            small, has one class or confidences that are all equal, was trained on or searched on before; if a table
            was computed with other weights; or if more than one target is given.
        `CannotCertifyError`: if the images do not certify the guarantee. The message says how many would.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification, calibrate

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2)).eval()
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(64)]
    >>> model.exit_config = calibrate(model, images, max_accuracy_drop=0.5)
    >>> model.exit_config.search["accuracy"] >= model.exit_config.search["baseline_accuracy"] - 0.005
    True
    ```
    """
    targets = {
        "max_accuracy_drop": max_accuracy_drop,
        "min_accuracy": min_accuracy,
        "max_latency_ms": max_latency_ms,
        "max_macs": max_macs,
        "speedup": speedup,
    }
    target = {name: value for name, value in targets.items() if value is not None}
    check_target(target, latency, batch_size, accuracy_margin, guarantee, certify_dataset, search_kwargs)
    rule = ExitConfig(fallback=fallback, criterion=criterion, temperatures=temperatures)
    rule = for_problem(rule, model.config.problem_type)
    rule.replace(thresholds=[0.0] * model.num_exits).resolve(model.num_exits)  # as many temperatures as exits
    cost_model = CostModel.of(model, batch_size, macs="max_macs" in target, milliseconds="max_latency_ms" in target)
    tables = _tables_of(model, dataset, split, guarantee, certify_dataset)
    _check_tables(model, tables, rule, halved=certify_dataset is None)

    certificate = None
    if not target and guarantee is None:
        thresholds, settings = _genetic(tables[0], rule, cost_model, search_kwargs)
        found = {"method": "genetic", **settings}
    else:
        found = {"method": "exact frontier", **{name: float(value) for name, value in target.items()}}
        if "max_latency_ms" in target:
            found["latency"] = latency
        if accuracy_margin is None:
            accuracy_margin = _known_margin(model.exit_config, tables[0])
        if accuracy_margin and guarantee is None and set(target) & set(ACCURACY_TARGETS):
            found["accuracy_margin"] = float(accuracy_margin)
        policies = policies_on_target(
            tables[0], rule, cost_model, target, latency, accuracy_margin, guarantee
        ).thresholds
        if guarantee is not None:
            certificate = _certified_on(tables, rule, policies, guarantee, halved=certify_dataset is None)
        thresholds = as_thresholds(policies[0 if certificate is None else certificate.policy])
    known = {name: getattr(model.exit_config, name) for name in ("trained_on", "costs")}
    return _result(tables, rule.replace(thresholds=thresholds, **known), found, cost_model, certificate)


def _known_margin(config: ExitConfig, table: ExitTable) -> float:
    """Return the margin of earlier thresholds on the same images, which have chosen the exits then."""
    search = config.search or {}
    return float(search.get("accuracy_margin", 0.0)) if search.get("fingerprint") == table.fingerprint else 0.0


def _tables_of(
    model: "ScanForImageClassification", dataset: Any, split: str, guarantee: RiskBound | None, certify_dataset: Any
) -> list[ExitTable]:
    """Return the logits to search on and, with a guarantee, those to certify on."""
    table = dataset if isinstance(dataset, ExitTable) else collect_exit_logits(model, dataset, split)
    if guarantee is None:
        return [table]
    if certify_dataset is None:
        return list(table.halves((table.split, f"{table.split}, the half to certify")))
    if isinstance(certify_dataset, ExitTable):
        return [table, certify_dataset]
    return [table, collect_exit_logits(model, certify_dataset, "certify")]


def _check_tables(
    model: "ScanForImageClassification", tables: list[ExitTable], rule: ExitConfig, halved: bool
) -> None:
    """Check the splits, and drop images from the second that are there twice or in the first."""
    check_apart(model, tables)
    check_roles(model.exit_config, tables, given=not halved)
    tables[1:] = [deduplicated(table, tables[0]) for table in tables[1:]]
    for table in tables:
        check_usable(table, rule)
    if hint := saturated(tables[0], rule):
        logger.warning(hint)


def _certified_on(
    tables: list[ExitTable], rule: ExitConfig, policies: np.ndarray, guarantee: RiskBound, halved: bool
) -> Certificate:
    """
    Certify the cheapest policy that passes, on the second table.

    Raises:
        `CannotCertifyError`: if none passes. Where one split was halved, it says so.
    """
    try:
        certificate = _certified(tables[1], rule, policies, guarantee)
    except CannotCertifyError as error:
        if not halved:
            raise
        raise CannotCertifyError(
            f"{error} (Half of the split's {len(tables[0]) + len(tables[1])} images chose the thresholds and the "
            "other half certifies them, so twice as many are needed in all.)"
        ) from error
    if np.isnan(policies[certificate.policy, : tables[0].num_exits - 1]).all():
        needed = _needed_by_next(tables[1], rule, policies[: certificate.policy], guarantee)
        logger.warning(
            f"Only the network without early exits is certified on the {len(tables[1])} images to certify on."
            + (f" About {needed:,} would certify the next cheaper thresholds." if needed else "")
        )
    return certificate


def _result(
    tables: list[ExitTable],
    config: ExitConfig,
    found: dict[str, Any],
    cost_model: CostModel,
    certificate: Certificate | None,
) -> ExitConfig:
    """Return thresholds with their provenance, and warn if they are slower than the plain network."""
    table = tables[0]
    config = config.replace(searched_on=digests_as_text(table.samples), weights=table.model)
    search = {**found, **_facts(table), **_outcome(table, config, cost_model)}
    if search["cost"] > 1 + 1e-9:
        logger.warning(
            f"The thresholds found cost {search['cost']:.3f} times as much as the plain network "
            f"({search['cost_unit']}): the exits cost more than they save. Allow a larger drop, or deploy "
            "`model.backbone`."
        )
    config = config.replace(search=search, reference=_reference(table, config))
    if certificate is None:
        return config
    return config.replace(guarantee={**certificate.to_dict(), **_facts(tables[1]), "rule": config.rule})


def certify_thresholds(model: "ScanForImageClassification", dataset: Any, bound: RiskBound) -> ExitConfig:
    """
    Certify the thresholds that a model has, wherever they come from, on images that did not choose them.

    Args:
        model ([`ScanForImageClassification`]): With its exit configuration.
        dataset (`datasets.Dataset` or [`ExitTable`]): Transformed images with labels, or their logits.
        bound ([`RiskBound`]): The bound to certify.

    Returns:
        [`ExitConfig`]: the model's, with a `guarantee`.

    Raises:
        `CannotCertifyError`: if the images do not certify the bound. The message says how many would.
        `ValueError`: as [`calibrate`], and if the thresholds were searched on these images.
    """
    config = model.exit_config
    thresholds = config.resolve(model.num_exits)
    check_bound(bound)
    table = dataset if isinstance(dataset, ExitTable) else collect_exit_logits(model, dataset, "certify")
    check_apart(model, [table])
    check_not_among(table, config.searched_on, "The thresholds were searched")
    table = deduplicated(table)
    check_usable(table, config)
    policy = np.array([[np.nan if threshold is None else threshold for threshold in thresholds]], dtype=float)
    certificate = _certified(table, config, policy, bound)
    return config.replace(guarantee={**certificate.to_dict(), **_facts(table), "rule": config.rule})


def _genetic(
    table: ExitTable, rule: ExitConfig, cost_model: CostModel, search_kwargs: dict[str, Any]
) -> tuple[list[float | None], dict[str, Any]]:
    scores, predictions = table.columns(rule)
    columns = num_answers(table.num_exits, rule.fallback)
    correct = (predictions == table.labels[:, None])[:, :columns]
    settings = {"beta": 0.5, "seed": 0, **search_kwargs}
    # JSON has no NumPy numbers.
    settings = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
    against = {"baseline_accuracy": table.baseline_accuracy, "plain_cost": cost_model.plain_image}
    costs = cost_model.cumulative(rule)[:columns]
    found = genetic_search(scores[:, :columns], correct, costs, **{**against, **settings})
    settings.pop("progress", None)
    return list(found.thresholds[:-1]), settings


def _certified(table: ExitTable, rule: ExitConfig, policies: np.ndarray, bound: RiskBound) -> Certificate:
    truth = table.deepest if bound.loss == "disagreement" else table.labels
    configs = (rule.replace(thresholds=as_thresholds(policy)) for policy in reversed(policies))
    right = (table.predictions(config) == truth for config in configs)
    return certify_answers(right, bound, table.deepest == table.labels, len(policies))


def _needed_by_next(table: ExitTable, rule: ExitConfig, cheaper: np.ndarray, bound: RiskBound) -> int | None:
    """Return about how many images the most expensive of some policies would need to be certified."""
    if len(cheaper) == 0:
        return None
    truth = table.deepest if bound.loss == "disagreement" else table.labels
    predictions = table.predictions(rule.replace(thresholds=as_thresholds(cheaper[-1])))
    return samples_needed(predictions == truth, table.deepest == table.labels, bound)


def _facts(table: ExitTable) -> dict[str, Any]:
    return {"split": table.split, "n": len(table), "fingerprint": table.fingerprint}


def _outcome(table: ExitTable, config: ExitConfig, cost_model: CostModel) -> dict[str, Any]:
    """Return accuracy and cost of a configuration on a split."""
    cost = cost_model.mean(config, table.exit_shares(config))
    outcome: dict[str, Any] = {
        "baseline_accuracy": table.baseline_accuracy,
        "accuracy": float((table.predictions(config) == table.labels).mean()),
        "cost": cost / cost_model.plain_image,
        "cost_unit": f"{cost_model.unit}, as a share of the plain backbone's",
    }
    if cost_model.measured is not None:
        outcome["milliseconds"] = {"mean": cost}
        if cost_model.images == 1:
            each = cost_model.cumulative(config)[table.exit_indices(config)]
            outcome["milliseconds"]["p95"] = float(np.quantile(each, 0.95, method="inverted_cdf"))
    return outcome


def _reference(table: ExitTable, config: ExitConfig) -> dict[str, Any]:
    """Return how many samples each exit answered with which confidence, as counts."""
    counts = count_answers(table.answers(config), table.num_exits, CONFIDENCE_BINS).tolist()
    return {"bins": CONFIDENCE_BINS, "counts": counts}
