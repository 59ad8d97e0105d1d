import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_scan import RiskBound
from hf_scan.calibration import CannotCertifyError, certify, evaluate_policies, exact_frontier
from hf_scan.calibration.certify import difference_p_value


def rejected(n: int, share: float, margin: float, repeats: int = 400) -> float:
    """How often the test says that a difference of rates is below the margin, where it is the margin."""
    rng = np.random.default_rng(0)
    rates = [(share + margin) / 2, (share - margin) / 2]
    draws = rng.multinomial(n, [*rates, 1 - sum(rates)], repeats)
    return float(np.mean([difference_p_value(int(a), int(b), n, margin, 0.001) <= 0.05 for a, b, _ in draws]))


@pytest.mark.parametrize(("n", "share"), list(itertools.product([200, 1000], [0.03, 0.1, 0.5])))
def test_the_test_of_the_difference_keeps_its_level(n, share):
    # 400 repeats of a test at the level of 5 % reject more than 33 times with a probability of a thousandth.
    assert rejected(n, share, margin=0.02) <= 33 / 400


def test_the_test_of_the_difference_has_power():
    """As the binomial one where nothing is won, but for the level that is added: 0.99 ** 302 is 4.8 %."""
    assert difference_p_value(0, 0, 302, 0.01, 0.001) <= 0.05 < difference_p_value(0, 0, 290, 0.01, 0.001)
    assert binomtest(0, 300, 0.01, "less").pvalue <= 0.05 < binomtest(0, 290, 0.01, "less").pvalue
    rng = np.random.default_rng(0)
    draws = rng.multinomial(5000, [0.02, 0.02, 0.96], 100)  # no difference, and a standard error of 0.28 points
    assert np.mean([difference_p_value(int(a), int(b), 5000, 0.01, 0.001) <= 0.05 for a, b, _ in draws]) > 0.9


def population(seed: int = 0, n: int = 20000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exits that know how sure they may be, the deepest right for 85 % of the samples."""
    rng = np.random.default_rng(seed)
    chances = np.clip(rng.beta(3, 0.6, (n, 1)) * np.array([0.75, 0.9, 1.0]), 0, 1)
    return chances, rng.random((n, 3)) < chances, np.array([0.3, 0.6, 1.0])


@pytest.mark.parametrize(
    "bound", [RiskBound(2.0, 0.1, "gap"), RiskBound(22.0, 0.1, "error"), RiskBound(12.0, 0.1, "disagreement")]
)
def test_what_is_certified_holds(bound):
    """Policies are chosen on some samples and certified on others; the risk is that of the whole population."""
    confidences, correct, costs = population()
    if bound.loss == "disagreement":
        correct = np.hstack(
            [np.random.default_rng(1).random((len(correct), 2)) < confidences[:, :2], correct[:, :1] | True]
        )
    rng = np.random.default_rng(2)
    violations, certified, repeats = 0, 0, 100
    for _ in range(repeats):
        search, certification = rng.integers(0, len(correct), (2, 1000))
        frontier = exact_frontier(confidences[search], correct[search], costs, max_policies=2500, polish=False)
        table = (confidences[certification], correct[certification], costs)
        try:
            found = certify(*table, frontier.thresholds, bound)
        except CannotCertifyError:
            continue
        certified += 1
        accuracy, _ = evaluate_policies(confidences, correct, costs, frontier.thresholds[[found.policy]])
        best = correct[:, -1].mean() if bound.loss == "gap" else 1.0
        violations += 100 * (best - accuracy[0]) > bound.max_drop
        assert found.p_value <= bound.delta
        assert found.n == 1000
    assert certified > repeats / 2
    # With a probability of a tenth each, more than 20 of 100 are a matter of one in a thousand.
    assert violations <= 20


def test_without_certification_it_would_not_hold():
    """The same, choosing the cheapest policy that keeps the bound on the samples it was searched on."""
    confidences, correct, costs = population()
    rng = np.random.default_rng(2)
    violations = 0
    for _ in range(50):
        search = rng.integers(0, len(correct), 1000)
        frontier = exact_frontier(confidences[search], correct[search], costs, max_policies=2500, polish=False)
        row = np.flatnonzero(frontier.accuracy >= correct[search, -1].mean() - 0.02)[0]
        accuracy, _ = evaluate_policies(confidences, correct, costs, frontier.thresholds[[row]])
        violations += 100 * (correct[:, -1].mean() - accuracy[0]) > 2.0
    assert violations > 20


def test_the_cheapest_that_passes_and_no_further():
    """One that fails ends the sequence, even if a cheaper one would pass."""
    confidences = np.tile([[0.1], [0.3], [0.5], [0.7], [0.9]], (400, 2))
    correct = np.ones((2000, 2), dtype=bool)
    correct[np.isclose(confidences[:, 0], 0.5), 0] = False
    policies = np.array([[0.6, 0.0], [0.4, 0.0], [0.6, 0.0], [0.8, 0.0], [1.0, 0.0]])
    found = certify(confidences, correct, np.array([1.0, 2.0]), policies, RiskBound(1.0))
    assert (found.policy, found.policies_tested, found.risk) == (2, 4, 0.0)


def test_baseline_and_negative_gaps():
    confidences, correct, costs = population(n=2000)
    nothing_leaves = np.array([[1.0, 1.0, 0.0]])
    worse = np.zeros(2000, dtype=bool)
    found = certify(confidences, correct, costs, nothing_leaves, RiskBound(1.0), baseline=worse)
    assert found.risk == pytest.approx(-100 * correct[:, -1].mean())
    with pytest.raises(CannotCertifyError):
        certify(confidences, correct, costs, nothing_leaves, RiskBound(1.0), baseline=~worse)


def test_too_few_samples_say_how_many_would_do():
    confidences, correct, costs = np.full((100, 2), 0.5), np.ones((100, 2), dtype=bool), np.array([1.0, 2.0])
    policy = np.array([[0.0, 0.0]])
    with pytest.raises(CannotCertifyError, match=r"which about (\d+) samples would certify") as error:
        certify(confidences, correct, costs, policy, RiskBound(1.0))
    needed = int(str(error.value).split("about ")[1].split()[0])
    assert 298 <= needed <= 320  # 0.99 ** 298 is 5 %
    more = [np.repeat(array, needed // 100 + 1, axis=0) for array in (confidences, correct)]
    assert certify(*more, costs, policy, RiskBound(1.0)).policy == 0
    with pytest.raises(CannotCertifyError, match="more samples would not help"):
        certify(confidences, ~correct, costs, policy, RiskBound(1.0, loss="error"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": 0.0}, "`max_drop` is 0.0"),
        ({"max_drop": float("nan")}, "`max_drop` is nan"),
        ({"delta": 1.0}, "`delta` is 1.0"),
        ({"loss": "regret"}, "`loss` is 'regret'"),
    ],
)
def test_bad_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        RiskBound(**arguments)


def test_bad_tables():
    confidences, correct, costs = population(n=50)
    with pytest.raises(ValueError, match="There are no policies"):
        certify(confidences, correct, costs, np.empty((0, 3)), RiskBound())
    with pytest.raises(ValueError, match=r"`baseline` has shape \(3,\)"):
        certify(confidences, correct, costs, np.zeros((1, 3)), RiskBound(), baseline=np.ones(3, dtype=bool))


def test_bounds_are_numbers():
    for bad in ({"max_drop": "1"}, {"delta": None}):
        with pytest.raises(TypeError, match="expected a number"):
            RiskBound(**bad)
