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
from ..model.exit_rule import answers_of, apply_exit_rule, num_answers
from ..model.problem_type import for_problem
from .certify import CannotCertifyError, Certificate, RiskBound, certify_answers, check_bound, samples_needed
from .cross_fitting import least_accuracy_to_ask
from .exit_frontier import exit_frontier
from .exit_table import ExitTable, collect_exit_logits
from .frontier import Frontier, undominated
from .genetic import genetic_search
from .monitor import count_answers
from .request import ACCURACY_TARGETS, _check_roles, _check_target
from .splits import check_apart, check_not_among, check_usable, deduplicated, saturated


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


logger = logging.get_logger(__name__)

# What of the reference a confidence counts in: twentieths of [0, 1].
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
    Finds thresholds on a split that neither training nor the final test uses: the cheapest that lose no more than what
    is allowed, or the most accurate that cost no more. Exits that cost more than they save are switched off.

    Costs are milliseconds where `model.exit_config.costs` holds what [`~hf_scan.measure_costs`] measured, and MACs
    otherwise; the result's `search["cost_unit"]` says which. Without a target, the paper's genetic search weighs both.

    Thresholds that were chosen as the best of many lose a little more on other images. So a target for the
    accuracy is for what other images are expected to have, by cross-fitting ([`least_accuracy_to_ask`]), and the split
    itself has no less; it is still as often missed as exceeded. With a `guarantee`, it is seldom missed.

    A warning says where the thresholds found are slower than the plain network, and where most scores are exactly 1.0,
    so that no threshold can tell samples apart and `temperatures` are needed.

    Args:
        model ([`ScanForImageClassification`]): The trained network.
        dataset (`datasets.Dataset` or [`ExitTable`]): Transformed images with labels, or their logits when they are
            there already.
        max_accuracy_drop (`float`, *optional*): Points that may be lost against the deepest exit, e.g. 0.5.
        min_accuracy (`float`, *optional*): Least accuracy, in [0, 1].
        max_latency_ms (`float`, *optional*): Most milliseconds for one image. Needs measured costs.
        latency (`str`, *optional*, defaults to `"mean"`): Of the images' milliseconds, the `"mean"` or `"p95"`, which
            95 % of them keep to.
        max_macs (`float`, *optional*): Most MACs of an image in the mean, e.g. 20e6.
        speedup (`float`, *optional*): Least speed-up over the plain backbone, e.g. 1.5.
        guarantee ([`RiskBound`], *optional*): Has the thresholds certified on images that did not choose them: the
            cheapest that pass, of those that meet the target; with a target for speed, the most accurate. It may be
            the only target.
        certify_dataset (`datasets.Dataset` or [`ExitTable`], *optional*): The images to certify on. Defaults to a
            random half of `dataset`, which the search then does not see.
        batch_size (`int`, *optional*, defaults to 1): Images at a time that measured costs are taken for. One of the
            sizes measured.
        fallback, criterion, temperatures (*optional*): As in [`ExitConfig`]. With several labels an image, the
            criterion is `"label_confidence"`, and an answer counts as right if all its labels are.
        split (`str`, *optional*, defaults to `"search"`): What the split is called in the result.
        search_kwargs: For [`genetic_search`], where no target is given: `beta`, `seed`, `generations` and so on.
            The baseline is the deepest exit's accuracy on the split.

    Returns:
        [`ExitConfig`]: to be set as `model.exit_config`. Its `search` says how the thresholds were found, its
        `guarantee` what was certified.

    Raises:
        `ValueError`: if the target is infeasible (the message says what is achievable); if the split is too small,
            has one class or confidences that are all equal, was trained on or searched on before; if a table is of
            other weights; or if targets contradict each other.
        `CannotCertifyError`: if the guarantee does not hold on the images to certify on. It says how many would do.

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
    _check_target(target, latency, guarantee, certify_dataset, search_kwargs)
    if latency == "p95" and batch_size != 1:
        raise ValueError("`latency='p95'` is for single images: the images of a batch have their answers together.")
    rule = ExitConfig(fallback=fallback, criterion=criterion, temperatures=temperatures)
    rule = for_problem(rule, model.config.problem_type)
    rule.replace(thresholds=[0.0] * model.num_exits).resolve(model.num_exits)  # as many temperatures as exits
    known = {name: getattr(model.exit_config, name) for name in ("trained_on", "costs")}
    cost_model = CostModel.of(model, batch_size, macs="max_macs" in target, milliseconds="max_latency_ms" in target)

    table = dataset if isinstance(dataset, ExitTable) else collect_exit_logits(model, dataset, split)
    tables = [table]
    if guarantee is not None:
        if certify_dataset is None:
            tables = list(table.halves((table.split, f"{table.split}, the half to certify")))
        elif isinstance(certify_dataset, ExitTable):
            tables.append(certify_dataset)
        else:
            tables.append(collect_exit_logits(model, certify_dataset, "certify"))
    check_apart(model, tables)
    _check_roles(model.exit_config, tables, given=certify_dataset is not None)
    tables[1:] = [deduplicated(one, tables[0]) for one in tables[1:]]
    for one in tables:
        check_usable(one, rule)

    table = tables[0]
    if hint := saturated(table, rule):
        logger.warning(hint)
    if not target and guarantee is None:
        thresholds, settings = _genetic(table, rule, cost_model, search_kwargs)
        found = {"method": "genetic", **settings}
    else:
        found = {"method": "exact frontier", **{name: float(value) for name, value in target.items()}}
        if "max_latency_ms" in target:
            found["latency"] = latency
        frontier = _policies_on_target(table, rule, cost_model, target, latency, guarantee)
        row = 0
        if guarantee is not None:
            try:
                certificate = _certified(tables[1], rule, frontier.thresholds, guarantee)
            except CannotCertifyError as error:
                if certify_dataset is not None:
                    raise
                raise CannotCertifyError(
                    f"{error} (Half of the split's {len(tables[0]) + len(tables[1])} images chose the thresholds, and "
                    "these are the others; so twice as many are needed in all.)"
                ) from error
            row = certificate.policy
            if np.isnan(frontier.thresholds[row, : table.num_exits - 1]).all():
                needed = _needed_by_next(tables[1], rule, frontier.thresholds[:row], guarantee)
                logger.warning(
                    f"Only the network without early exits keeps the guarantee on the {len(tables[1])} images to "
                    "certify on." + (f" About {needed:,} would certify the next cheaper thresholds." if needed else "")
                )
        thresholds = _as_list(frontier.thresholds[row])
    config = rule.replace(
        thresholds=thresholds, searched_on=digests_as_text(table.samples), weights=table.model, **known
    )
    search = {**found, **_facts(table), **_outcome(table, config, cost_model)}
    if search["cost"] > 1 + 1e-9:
        logger.warning(
            f"The thresholds found cost {search['cost']:.3f} times what the plain network does "
            f"({search['cost_unit']}): the exits take more than they save. Allow a larger drop, or deploy "
            "`model.backbone`."
        )
    config = config.replace(search=search, reference=_reference(table, config))
    if guarantee is not None:
        config = config.replace(guarantee={**certificate.to_dict(), **_facts(tables[1]), "rule": config.rule})
    return config


def certify_thresholds(model: "ScanForImageClassification", dataset: Any, bound: RiskBound) -> ExitConfig:
    """
    Certifies the thresholds that a model has, wherever they come from, on images that had no part in choosing them.

    Args:
        model ([`ScanForImageClassification`]): With its exit configuration.
        dataset (`datasets.Dataset` or [`ExitTable`]): Transformed images with labels, or their logits.
        bound ([`RiskBound`]): What is to be guaranteed.

    Returns:
        [`ExitConfig`]: the model's, with a `guarantee`.

    Raises:
        `CannotCertifyError`: if the guarantee does not hold. It says how many images would do.
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
    baseline = float(correct[:, table.num_exits - 1].mean())
    settings = {"beta": 0.5, "seed": 0, **search_kwargs}
    # JSON knows no numbers of NumPy.
    settings = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
    against = {"baseline_accuracy": baseline, "plain_cost": cost_model.plain_image}
    costs = cost_model.cumulative(rule)[:columns]
    found = genetic_search(scores[:, :columns], correct, costs, **{**against, **settings})
    settings.pop("progress", None)
    return list(found.thresholds[:-1]), settings


def _policies_on_target(
    table: ExitTable,
    rule: ExitConfig,
    cost_model: CostModel,
    target: dict[str, float],
    latency: str,
    guarantee: RiskBound | None,
) -> Frontier:
    """Return the policies of the frontier that meet the target; the first is taken where none has to be certified."""
    disagreement = guarantee is not None and guarantee.loss == "disagreement"
    truth = table.deepest if disagreement else table.labels
    name, value = next(iter(target.items()), ("", 0.0))
    baseline = float((table.deepest == table.labels).mean())
    least_accuracy = value if name == "min_accuracy" else baseline - value / 100
    if name == "max_latency_ms" and latency == "p95":
        frontier, fits, best = _mostly_within(table, rule, cost_model, value, truth)
    else:
        frontier = exit_frontier(table, rule, cost_model.cumulative, truth)
        if cost_model.images > 1:
            frontier = _in_shrinking_batches(table, rule, cost_model, frontier)
        if name in ACCURACY_TARGETS:
            frontier, accuracy = _with_accuracy(table, rule, frontier, known=not disagreement)
            fits = accuracy >= least_accuracy - 1e-12
            if guarantee is None and fits.any():
                asked = _required_accuracy(table, rule, cost_model, least_accuracy)
                fits = accuracy >= min(asked, accuracy.max()) - 1e-12
            highest = accuracy.max()
            best = f"the highest accuracy is {highest:.2%}, {100 * (baseline - highest):+.2f} points of drop"
        elif name:
            fits = frontier.cost <= (cost_model.plain_image / value if name == "speedup" else value) * (1 + 1e-12)
            least, unit = frontier.cost.min(), cost_model.unit.split(",")[0]
            times = cost_model.plain_image / least
            best = f"the least is {least:.5g} {unit} for an image, {times:.2f} times as fast as the plain backbone"
        else:
            fits, best = np.ones(len(frontier), dtype=bool), ""
    if not fits.any():
        raise ValueError(f"No thresholds reach `{name}={value:g}` on this split: {best}.")
    frontier = frontier.select(fits)
    if name and name not in ACCURACY_TARGETS:
        return frontier.select(np.array([-1]))  # the most accurate
    if guarantee is None:
        return frontier.select(np.array([0]))  # the cheapest
    # What does not keep the bound here is not worth a test there; the safest is tested in any case.
    compared = baseline if guarantee.loss == "gap" else 1.0
    promising = compared - frontier.accuracy <= guarantee.max_drop / 100
    promising[-1] = True
    frontier = _thinned(frontier.select(promising))
    if guarantee.loss == "error" or (name and baseline < least_accuracy):
        return frontier
    # Without early exits nothing is lost for certain, and so it is tested first; on the frontier it need not be.
    plain = np.zeros((1, frontier.thresholds.shape[1]))
    plain[0, : table.num_exits - 1] = np.nan
    top = Frontier(np.array([compared]), np.array([cost_model.plain_image]), plain)
    return Frontier(*(np.concatenate(pair) for pair in zip(vars(frontier).values(), vars(top).values())))


TIE = 1e-6
# Policies of a frontier that are looked at one by one.
MOST_POLICIES = 200


def _mostly_within(
    table: ExitTable, rule: ExitConfig, cost_model: CostModel, limit: float, truth: np.ndarray
) -> tuple[Frontier, np.ndarray, str]:
    """The frontier of accuracy over the share of images that cost more than a limit, and where that is at most 5 %."""

    def costs_of(config: ExitConfig) -> np.ndarray:
        cumulative = cost_model.cumulative(config)
        return (cumulative > limit) + TIE * cumulative / cumulative[-1]  # how much more only breaks ties

    frontier = exit_frontier(table, rule, costs_of, truth)
    return frontier, frontier.cost <= 0.05 + TIE, f"at least {frontier.cost.min():.1%} of the images take longer"


def _in_shrinking_batches(table: ExitTable, rule: ExitConfig, cost_model: CostModel, frontier: Frontier) -> Frontier:
    """The frontier counts full batches; what is left of one takes longer for each image."""
    frontier = _thinned(frontier)
    policies = [rule.replace(thresholds=_as_list(thresholds)) for thresholds in frontier.thresholds]
    cost = np.array([cost_model.mean(policy, _shares(table, policy)) for policy in policies])
    return Frontier(frontier.accuracy, cost, frontier.thresholds).select(undominated(frontier.accuracy, cost))


def _with_accuracy(table: ExitTable, rule: ExitConfig, frontier: Frontier, known: bool) -> tuple[Frontier, np.ndarray]:
    """A frontier, and its policies' accuracy, which is not what it holds if that is agreement."""
    if known:
        return frontier, frontier.accuracy
    frontier = _thinned(frontier)
    predictions = (_answers(table, rule, thresholds) for thresholds in frontier.thresholds)
    return frontier, np.array([(classes == table.labels).mean() for classes in predictions])


POLICIES_OF_A_FOLD = 200_000


def _required_accuracy(table: ExitTable, rule: ExitConfig, cost_model: CostModel, least_accuracy: float) -> float:
    """Return the accuracy to require on the split, so that other images have the target's."""

    def frontier_of(rows: np.ndarray) -> Frontier:
        part = table.select(rows)
        return exit_frontier(part, rule, cost_model.cumulative, max_policies=POLICIES_OF_A_FOLD, polish=False)

    def accuracies_of(policies: np.ndarray, rows: np.ndarray) -> np.ndarray:
        part = table.select(rows)
        return np.array([(_answers(part, rule, thresholds) == part.labels).mean() for thresholds in policies])

    return least_accuracy_to_ask(least_accuracy, table.deepest == table.labels, frontier_of, accuracies_of)


def _thinned(frontier: Frontier) -> Frontier:
    return frontier.select(np.unique(np.linspace(0, len(frontier) - 1, MOST_POLICIES, dtype=int)))


def _certified(table: ExitTable, rule: ExitConfig, policies: np.ndarray, bound: RiskBound) -> Certificate:
    truth = table.deepest if bound.loss == "disagreement" else table.labels
    right = (_answers(table, rule, thresholds) == truth for thresholds in reversed(policies))
    return certify_answers(right, bound, table.deepest == table.labels, len(policies))


def _needed_by_next(table: ExitTable, rule: ExitConfig, cheaper: np.ndarray, bound: RiskBound) -> int | None:
    """How many images the most expensive of some policies would need to be certified, about."""
    if len(cheaper) == 0:
        return None
    truth = table.deepest if bound.loss == "disagreement" else table.labels
    return samples_needed(_answers(table, rule, cheaper[-1]) == truth, table.deepest == table.labels, bound)


def _answers(table: ExitTable, rule: ExitConfig, thresholds: np.ndarray) -> np.ndarray:
    """The classes that a policy answers, `(n,)`."""
    config = rule.replace(thresholds=_as_list(thresholds))
    answers = apply_exit_rule(torch.from_numpy(table.logits).unbind(dim=1), config)
    return answers_of(answers.logits, config).numpy()


def _shares(table: ExitTable, config: ExitConfig) -> list[float]:
    """The shares that leave at each exit, and at last at none."""
    return (np.bincount(_left_at(table, config), minlength=table.num_exits + 1) / len(table)).tolist()


def _left_at(table: ExitTable, config: ExitConfig) -> np.ndarray:
    # What answers with the most confident of all exits, or with the deepest, has left at none of them.
    return apply_exit_rule(
        torch.from_numpy(table.logits).unbind(dim=1), config.replace(fallback="ensemble")
    ).exit_index.numpy()


def _as_list(thresholds: np.ndarray) -> list[float | None]:
    return [None if np.isnan(threshold) else float(threshold) for threshold in thresholds]


def _facts(table: ExitTable) -> dict[str, Any]:
    return {"split": table.split, "n": len(table), "fingerprint": table.fingerprint}


def _outcome(table: ExitTable, config: ExitConfig, cost_model: CostModel) -> dict[str, Any]:
    """What a configuration gives on a split."""
    answers = apply_exit_rule(torch.from_numpy(table.logits).unbind(dim=1), config)
    cost = cost_model.mean(config, _shares(table, config))
    outcome: dict[str, Any] = {
        "baseline_accuracy": float((table.deepest == table.labels).mean()),
        "accuracy": float((answers_of(answers.logits, config).numpy() == table.labels).mean()),
        "cost": cost / cost_model.plain_image,
        "cost_unit": f"{cost_model.unit}, as a share of the plain backbone's",
    }
    if cost_model.measured is not None:
        outcome["milliseconds"] = {"mean": cost}
        if cost_model.images == 1:
            each = cost_model.cumulative(config)[_left_at(table, config)]
            outcome["milliseconds"]["p95"] = float(np.quantile(each, 0.95, method="inverted_cdf"))
    return outcome


def _reference(table: ExitTable, config: ExitConfig) -> dict[str, Any]:
    """Where samples left and how sure they were, as counts: a row for each exit and the last answer."""
    answers = apply_exit_rule(torch.from_numpy(table.logits).unbind(dim=1), config)
    counts = count_answers(answers, table.num_exits, CONFIDENCE_BINS).tolist()
    return {"bins": CONFIDENCE_BINS, "counts": counts}
