# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Certify a bound on the risk of thresholds, with a stated confidence level."""

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
    A bound on the risk: at most `max_drop` points, with a confidence level of `1 - delta`.

    Args:
        max_drop (`float`, *optional*, defaults to 1.0): The bound, in points (hundredths).
        delta (`float`, *optional*, defaults to 0.05): Probability that the guarantee is wrong: one minus the
            confidence level.
        loss (`str`, *optional*, defaults to `"gap"`): The loss whose mean the risk is. `"gap"`: the accuracy of the
            deepest exit minus that of the adaptive answers. `"disagreement"`: the share of samples whose answer
            differs from the deepest exit's, right or wrong. `"error"`: the share of wrong answers.

    Raises:
        `TypeError`: if `max_drop` or `delta` is not a number.
        `ValueError`: if `max_drop` or `delta` is out of range, or `loss` is unknown.
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
            object.__setattr__(self, name, float(getattr(self, name)))  # JSON has no NumPy numbers


@dataclass(frozen=True)
class Certificate:
    """
    The result of [`certify`].

    Args:
        policy (`int`): The row of the cheapest policy that is certified.
        risk (`float`): Its risk on the samples, in points. The guarantee is `bound`, not this.
        bound (`RiskBound`): The certified bound.
        p_value (`float`): Its p-value under H0: risk > bound. At most `delta`.
        n (`int`): Number of samples.
        test (`str`): Name of the test.
        policies_tested (`int`): Number of policies tested, one after another, each at the level `delta`.
    """

    policy: int
    risk: float
    bound: RiskBound
    p_value: float
    n: int
    test: str
    policies_tested: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without the row, which means nothing elsewhere."""
        values = asdict(self)
        del values["policy"]
        return {**values.pop("bound"), **values}


class CannotCertifyError(ValueError):
    """Raised if the samples do not certify the bound."""


def check_bound(bound: RiskBound) -> None:
    """Raise a `TypeError` unless `bound` is a [`RiskBound`]."""
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
    Find the cheapest of some policies whose risk is certified to be at most the bound, on samples that did not choose
    the policies.

    The policies are tested from the most expensive on, each at the full level `delta`, until one fails. No correction
    for multiple tests is needed, because the order is fixed before these samples are used ("learn then test":
    Angelopoulos et al., 2021, with fixed sequence testing). A loss of 0 or 1 has the exact binomial test. The gap is
    -1, 0 or 1 for a sample; its test is exact too. Its p-value is the largest over a grid of the nuisance parameter,
    the share of samples on which the two answers differ, within a confidence interval at the level `delta / 50`, and
    that level is added ([`difference_p_value`]).

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
        `CannotCertifyError`: if not even the most expensive policy passes. The message says how many samples would.
        `ValueError`: if the arrays do not belong together, are empty, or hold NaN, or costs decrease with depth.

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
    Certify policies as [`certify`] does, from whether their answers are right.

    Args:
        right (`Iterable[np.ndarray]`): Of each policy, from the most expensive to the cheapest, whether its answers
            are right, `(n,)`. Only those that are tested are read.
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
    """Return the mean loss, in points."""
    loss = compared.astype(int) - right if bound.loss == "gap" else ~right
    return 100 * float(loss.mean())


def _p_value(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> float:
    if bound.loss == "gap":
        lost, won = int((compared & ~right).sum()), int((right & ~compared).sum())
        return difference_p_value(lost, won, len(right), bound.max_drop / 100, bound.delta / 50)
    return float(binom.cdf(np.count_nonzero(~right), len(right), bound.max_drop / 100))


SHARES = 33  # values of the nuisance parameter, over which the p-value is maximised


def difference_p_value(lost: int, won: int, n: int, margin: float, level: float) -> float:
    """
    Return the exact p-value of a paired difference of at most `lost - won` among `n` samples, under H0: the true rates
    differ by `margin` or more.

    Outcomes are ordered by their likelihood ratio. Given the number of samples that are lost or won, the number lost
    is binomial; the share of these samples among all is the nuisance parameter that the p-value is maximised over.

    Source: Berger and Boos, "P Values Maximized Over a Confidence Set for the Nuisance Parameter", JASA 1994.

    Args:
        lost (`int`): Samples of one kind, such as those that only the baseline gets right.
        won (`int`): Samples of the other kind.
        n (`int`): All samples.
        margin (`float`): The difference of the two rates under H0, above 0.
        level (`float`): Level of the confidence set for the nuisance parameter, which is added to the p-value.
    """
    differ = lost + won
    low = beta.ppf(level / 2, differ, n - differ + 1) if differ else 0.0
    high = beta.ppf(1 - level / 2, differ + 1, n - differ) if differ < n else 1.0
    # Rates that differ by the margin have a sum of no less.
    shares = np.linspace(max(low, margin), max(high, margin), SHARES)
    spread = 8 * np.sqrt(n * shares[-1]) + 8
    counts = np.arange(max(0, int(n * shares[0] - spread)), min(n, int(n * shares[-1] + spread)) + 1)
    # For each number of samples that differ, by bisection: the largest number lost with as much evidence against H0 as
    # the data has; -1 for none.
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
    """Return the log-likelihood ratio against a difference of the margin; negative if the observed one is larger."""
    same = n - lost - won
    # The maximum likelihood estimate of the rate of samples won, if that of samples lost is larger by the margin: a
    # root of a quadratic equation.
    linear = (lost + won) * (1 - margin) - 2 * margin * (won + same)
    rate = (linear + np.sqrt(linear**2 + 8 * n * won * margin * (1 - margin))) / (4 * n)
    rate = np.clip(rate, 0, (1 - margin) / 2)
    free = xlogy(lost, lost / n) + xlogy(won, won / n) + xlogy(same, same / n)
    bound = xlogy(lost, rate + margin) + xlogy(won, rate) + xlogy(same, 1 - 2 * rate - margin)
    return np.sign(margin - (lost - won) / n) * np.maximum(free - bound, 0)


MOST_SAMPLES = 10_000_000


def _too_few(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> str:
    """Return the message for samples that do not certify even the policy with the smallest risk."""
    n, risk = len(right), _risk(right, compared, bound)
    loss = f"{'an' if bound.loss == 'error' else 'a'} {bound.loss}"
    claim = f"{loss} of at most {bound.max_drop:g} points with {100 * (1 - bound.delta):g} % confidence"
    if risk >= bound.max_drop:
        return (
            f"{n} samples do not certify {claim}: the most expensive policy has {risk:.2f} points on them, and more "
            "samples would not help. Allow a larger `max_drop`."
        )
    needed = samples_needed(right, compared, bound)
    count = f"about {needed:,}" if needed is not None else f"more than {MOST_SAMPLES:,}"
    return (
        f"{n} samples do not certify {claim}: the most expensive policy has {risk:.2f} points on them, which {count} "
        "samples would certify. Cheaper policies need more. Use more samples, a larger `max_drop` or a larger `delta`."
    )


def samples_needed(right: np.ndarray, compared: np.ndarray, bound: RiskBound) -> int | None:
    """
    Estimate how many samples would certify a policy, from its risk on some. `None` if no number would, or only one
    above 10 million.

    Args:
        right (`np.ndarray` of shape `(n,)`): Whether its answers are right.
        compared (`np.ndarray` of shape `(n,)`): Whether the answers that it is compared with are right.
        bound ([`RiskBound`]): The bound to certify.
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
    """Return about the smallest number that suffices, at most a twentieth too large."""
    number = least
    while not suffices(number):
        number = int(number * 1.05) + 1
        if number > most:
            return None
    return number
