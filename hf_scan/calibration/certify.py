# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A guarantee for thresholds: a bound on what they lose that holds with a stated probability."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import xlogy
from scipy.stats import beta, binom

from .policy import answering_column, check_table


@dataclass(frozen=True)
class RiskBound:
    """
    What is to be guaranteed: that the risk is at most `max_drop` points, but for a probability of `delta` that the
    samples it is certified on happen to be too kind.

    Args:
        max_drop (`float`, *optional*, defaults to 1.0): The most that the risk may be, in points (hundredths).
        delta (`float`, *optional*, defaults to 0.05): The probability with which the guarantee may be wrong.
        loss (`str`, *optional*, defaults to `"gap"`): What the risk is the mean of. `"gap"`: the accuracy of the
            deepest exit less that of the adaptive answers. `"disagreement"`: the share of samples that are answered
            otherwise than by the deepest exit, right or wrong. `"error"`: the share that is answered wrong.

    Raises:
        `ValueError`: if `max_drop` or `delta` are out of range, or there is no such loss.
    """

    max_drop: float = 1.0
    delta: float = 0.05
    loss: Literal["gap", "disagreement", "error"] = "gap"

    def __post_init__(self) -> None:
        for name in ("max_drop", "delta"):
            if isinstance(getattr(self, name), (str, bool, type(None))):
                raise TypeError(f"`{name}` is {getattr(self, name)!r}; expected a number.")
        if not 0 < self.max_drop < 100:
            raise ValueError(f"`max_drop` is {self.max_drop}; expected points between 0 and 100.")
        if not 0 < self.delta < 1:
            raise ValueError(f"`delta` is {self.delta}; expected a probability between 0 and 1, such as 0.05.")
        if self.loss not in ("gap", "disagreement", "error"):
            raise ValueError(f"`loss` is {self.loss!r}; expected 'gap', 'disagreement' or 'error'.")
        for name in ("max_drop", "delta"):
            object.__setattr__(self, name, float(getattr(self, name)))  # JSON knows no numbers of NumPy


@dataclass(frozen=True)
class Certificate:
    """
    What [`certify`] found.

    Args:
        policy (`int`): The row of the cheapest policy that is certified.
        risk (`float`): Its risk on the samples, in points. The guarantee is `bound`, not this.
        bound (`RiskBound`): What is guaranteed.
        p_value (`float`): How likely samples as kind as these are, if its risk were above the bound. At most `delta`.
        n (`int`): Samples.
        test (`str`): The test, in words.
        policies_tested (`int`): How many policies were tested, one after another, each at the level `delta`.
    """

    policy: int
    risk: float
    bound: RiskBound
    p_value: float
    n: int
    test: str
    policies_tested: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, without the row, which means nothing elsewhere."""
        values = asdict(self)
        del values["policy"]
        return {**values.pop("bound"), **values}


class CannotCertifyError(ValueError):
    """The samples do not suffice for the guarantee that was asked for."""


def check_bound(bound: RiskBound) -> None:
    """Raises a `TypeError` for what is no [`RiskBound`]."""
    if not isinstance(bound, RiskBound):
        raise TypeError(f"The guarantee is {bound!r}; expected a `RiskBound`, such as `RiskBound(max_drop=1.0)`.")


BINOMIAL = "exact binomial test"
DIFFERENCE = "exact unconditional test of the paired difference (Berger and Boos, 1994)"


def certify(
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    thresholds: np.ndarray,
    bound: RiskBound,
    baseline: np.ndarray | None = None,
) -> Certificate:
    """
    Finds the cheapest of some policies whose risk is at most what is asked for, on samples that did not choose the
    policies.

    The policies are tested from the most expensive one on, each at the full level `delta`, until one fails: testing in
    an order that these samples had no part in needs no correction ("learn then test": Angelopoulos et al., 2021, with
    fixed sequence testing). Where the loss is 0 or 1, by the exact binomial test. The gap's is -1, 0 or 1; its test is
    exact too, the largest over the shares of samples on which the two differ (a grid of them) that a confidence
    interval at a level of `delta / 50` holds, with that level added.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): Confidence of each possible answer, shallow to deep.
        correct (`np.ndarray` of shape `(n, columns)`): Whether each answer is right; for `"disagreement"`, whether it
            is the deepest exit's.
        costs (`np.ndarray` of shape `(columns,)`): Cumulative cost of each answer.
        thresholds (`np.ndarray` of shape `(policies, columns)`): From cheap to expensive, as [`Frontier`] holds them.
        bound ([`RiskBound`]): What is to be guaranteed.
        baseline (`np.ndarray` of shape `(n,)`, *optional*): For `"gap"`, whether the answers that are compared with
            are right. Defaults to the last column's.

    Returns:
        [`Certificate`]

    Raises:
        `CannotCertifyError`: if not even the most expensive policy passes. The message says how many samples would do.
        `ValueError`: if the arrays do not belong together, are empty, or hold NaN, or costs fall with depth.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan.calibration import RiskBound, certify

    >>> rng = np.random.default_rng(0)
    >>> confidences, correct = rng.random((1000, 2)), np.ones((1000, 2), dtype=bool)
    >>> certificate = certify(
    ...     confidences, correct, np.array([0.5, 1.0]), np.array([[0.5, 0.0], [1.0, 0.0]]), RiskBound(max_drop=1.0)
    ... )
    >>> certificate.policy, certificate.n, certificate.p_value < 0.01
    (0, 1000, True)
    ```
    """
    check_bound(bound)
    confidences, correct, costs = check_table(confidences, correct, costs)
    thresholds = np.atleast_2d(np.asarray(thresholds, dtype=float))
    if len(thresholds) == 0:
        raise ValueError("There are no policies to certify; expected at least one row of `thresholds`.")
    compared = correct[:, -1] if baseline is None else np.asarray(baseline, dtype=bool)
    if compared.shape != correct.shape[:1]:
        raise ValueError(
            f"`baseline` has shape {compared.shape}; expected one value for each of {len(correct)} samples."
        )
    rows = np.arange(len(correct))
    right = (correct[rows, answering_column(confidences, policy)] for policy in reversed(thresholds))
    return certify_answers(right, bound, compared, len(thresholds))


def certify_answers(right: Iterable[np.ndarray], bound: RiskBound, baseline: np.ndarray, policies: int) -> Certificate:
    """
    [`certify`] on what policies answer.

    Args:
        right (`Iterable[np.ndarray]`): Of each policy, from the most expensive to the cheapest, whether its answers
            are right, `(n,)`. Only those that are tested are asked for.
        bound ([`RiskBound`]): What is to be guaranteed.
        baseline (`np.ndarray` of shape `(n,)`): Whether the answers that are compared with are right.
        policies (`int`): How many there are.

    Returns:
        [`Certificate`]: `policy` counts from the cheapest.

    Raises:
        `CannotCertifyError`: if not even the most expensive policy passes.
    """
    passed: dict[str, Any] = {}
    tested = 0
    for row, answers in zip(reversed(range(policies)), right):
        p_value = _p_value(answers, baseline, bound)
        tested += 1
        if p_value > bound.delta:
            break
        passed = {"policy": row, "risk": _risk(answers, baseline, bound), "p_value": p_value}
    if not passed:
        raise CannotCertifyError(_too_few(answers, baseline, bound))
    test = DIFFERENCE if bound.loss == "gap" else BINOMIAL
    return Certificate(**passed, bound=bound, n=len(baseline), test=test, policies_tested=tested)


def _risk(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> float:
    """In points."""
    loss = compared.astype(int) - right if bound.loss == "gap" else ~right
    return 100 * float(loss.mean())


def _p_value(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> float:
    if bound.loss == "gap":
        lost, won = int((compared & ~right).sum()), int((right & ~compared).sum())
        return difference_p_value(lost, won, len(right), bound.max_drop / 100, bound.delta / 50)
    return float(binom.cdf(np.count_nonzero(~right), len(right), bound.max_drop / 100))


SHARES = 33  # of samples on which the two differ, over which the largest p-value is looked for


def difference_p_value(lost: int, won: int, n: int, margin: float, level: float) -> float:
    """
    How likely a difference of at most `lost - won` among n samples is, if the true rates differ by `margin`.

    Outcomes are ordered by their likelihood ratio. Given how many samples are lost or won, those lost are binomial;
    the share of these in all is the nuisance that the p-value is the largest over.

    Source: Berger and Boos, "P Values Maximized Over a Confidence Set for the Nuisance Parameter", JASA 1994.

    Args:
        lost (`int`): Samples of one kind, such as those that only the baseline gets right.
        won (`int`): Samples of the other kind.
        n (`int`): All samples.
        margin (`float`): The difference of the two rates that is tested for, above 0.
        level (`float`): Of the confidence set for the nuisance; it is added to the p-value.
    """
    differ = lost + won
    low = beta.ppf(level / 2, differ, n - differ + 1) if differ else 0.0
    high = beta.ppf(1 - level / 2, differ + 1, n - differ) if differ < n else 1.0
    # Rates that differ by the margin have a sum of no less.
    shares = np.linspace(max(low, margin), max(high, margin), SHARES)
    spread = 8 * np.sqrt(n * shares[-1]) + 8
    counts = np.arange(max(0, int(n * shares[0] - spread)), min(n, int(n * shares[-1] + spread)) + 1)
    # Of k samples that differ, the most that may be lost for as much evidence as in the data, by halving. -1 for none.
    evidence = _evidence(np.array(lost), np.array(won), n, margin) - 1e-9
    most_lost, too_many = np.full(len(counts), -1), counts + 1
    while (too_many - most_lost > 1).any():
        middle = (most_lost + too_many) // 2
        enough = _evidence(np.maximum(middle, 0), counts - np.maximum(middle, 0), n, margin) >= evidence
        most_lost, too_many = np.where(enough, middle, most_lost), np.where(enough, too_many, middle)
    given_count = binom.cdf(most_lost, counts, ((shares + margin) / (2 * shares))[:, None])
    p_values = np.sum(binom.pmf(counts, n, shares[:, None]) * given_count, axis=1)
    return min(1.0, float(np.max(p_values)) + level)


def _evidence(lost: np.ndarray, won: np.ndarray, n: int, margin: float) -> np.ndarray:
    """Log-likelihood ratio against a difference of the margin; below 0 where the data's own is larger than that."""
    same = n - lost - won
    # The rate of those won that is most likely if that of those lost is larger by the margin: a root of a quadratic.
    linear = (lost + won) * (1 - margin) - 2 * margin * (won + same)
    rate = (linear + np.sqrt(linear**2 + 8 * n * won * margin * (1 - margin))) / (4 * n)
    rate = np.clip(rate, 0, (1 - margin) / 2)
    free = xlogy(lost, lost / n) + xlogy(won, won / n) + xlogy(same, same / n)
    bound = xlogy(lost, rate + margin) + xlogy(won, rate) + xlogy(same, 1 - 2 * rate - margin)
    return np.sign(margin - (lost - won) / n) * np.maximum(free - bound, 0)


MOST_SAMPLES = 10_000_000


def _too_few(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> str:
    """What the policy with the smallest risk would need."""
    n, risk = len(right), _risk(right, compared, bound)
    loss = f"{'an' if bound.loss == 'error' else 'a'} {bound.loss}"
    asked = f"{loss} of at most {bound.max_drop:g} points with a probability of {1 - bound.delta:g}"
    if risk >= bound.max_drop:
        return (
            f"{n} samples do not certify {asked}: the most expensive policy has {risk:.2f} points on them, and more "
            "samples of the kind would not help. Allow a larger `max_drop`."
        )
    needed = samples_needed(right, compared, bound)
    count = f"about {needed:,}" if needed is not None else f"more than {MOST_SAMPLES:,}"
    return (
        f"{n} samples do not certify {asked}: the most expensive policy has {risk:.2f} points on them, which {count} "
        "samples of the kind would certify. Cheaper ones need more. Give more, allow a larger `max_drop`, or a larger "
        "`delta`."
    )


def samples_needed(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> int | None:
    """
    How many samples like these would certify a policy, about; `None` where more would not help or too many would do.

    Args:
        right (`np.ndarray` of shape `(n,)`): Whether its answers are right.
        compared (`np.ndarray` of shape `(n,)`): Whether the answers that are compared with are right.
        bound ([`RiskBound`]): What is to be guaranteed.
    """
    if _risk(right, compared, bound) >= bound.max_drop:
        return None
    shares = ((compared & ~right).mean(), (right & ~compared).mean(), (~right).mean())

    def suffices(samples: int) -> bool:
        lost, won, wrong = (round(float(share) * samples) for share in shares)
        if bound.loss == "gap":
            return difference_p_value(lost, won, samples, bound.max_drop / 100, bound.delta / 50) <= bound.delta
        return bool(binom.cdf(wrong, samples, bound.max_drop / 100) <= bound.delta)

    return _first(suffices, len(right), MOST_SAMPLES)


def _first(suffices: Callable[[int], bool], least: int, most: int) -> int | None:
    """About the smallest number that suffices, to a twentieth."""
    number = least
    while not suffices(number):
        number = int(number * 1.05) + 1
        if number > most:
            return None
    return number
