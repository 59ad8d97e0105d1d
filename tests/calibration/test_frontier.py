import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scan.calibration import (
    answering_column,
    evaluate_policies,
    exact_frontier,
    genetic_search,
    oracle_policy,
    shared_threshold_frontier,
)

from .samples import scores


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_no_search_beats_the_frontier_where_the_grid_is_coarse(beta):
    rng = np.random.default_rng(1)
    skill = rng.normal(size=(1500, 1)) + np.linspace(0.5, 2, 4)
    confidences = 1 / (1 + np.exp(-skill - 0.7 * rng.normal(size=(1500, 4))))
    table = confidences, rng.random((1500, 4)) < confidences, np.linspace(0.3, 1, 4)
    frontier = exact_frontier(*table, max_policies=20_000)
    for seed in range(3):
        found = genetic_search(*table, beta=beta, threshold_range=0.9, seed=seed, progress=False)
        assert frontier.accuracy[frontier.cost <= found.cost + 1e-12].max() >= found.accuracy


@pytest.mark.parametrize("change", [lambda c: -c, lambda c: 5 * c - 2, lambda c: np.log(c)])
def test_a_frontier_of_scores_that_are_no_shares(change):
    """What only the order of scores decides does not change with them."""
    confidences, correct, costs = scores(200)
    order = np.sign(change(np.array([0.9]))[0] - change(np.array([0.1]))[0])
    expected = exact_frontier(order * confidences if order < 0 else confidences, correct, costs)
    found = exact_frontier(change(confidences), correct, costs)
    assert np.array_equal(found.accuracy, expected.accuracy)
    assert np.array_equal(found.cost, expected.cost)
    assert found.cost[0] == pytest.approx(costs[0])  # everything leaves at once


def test_a_frontier_of_many_exits():
    rng = np.random.default_rng(0)
    confidences = rng.random((300, 13))
    table = confidences, rng.random((300, 13)) < confidences, np.linspace(0.2, 1, 13)
    frontier = exact_frontier(*table, max_policies=50_000)
    for row in (0, len(frontier) // 2, -1):
        accuracy, cost = evaluate_policies(*table, frontier.thresholds[row])
        assert (accuracy[0], cost[0]) == (frontier.accuracy[row], frontier.cost[row])
    shared = shared_threshold_frontier(*table)
    for accuracy, cost in zip(shared.accuracy, shared.cost):
        assert frontier.accuracy[frontier.cost <= cost + 1e-9].max() >= accuracy - 0.02


def test_a_frontier_of_one_answer():
    frontier = exact_frontier(np.full((4, 1), 0.5), np.array([[1], [1], [0], [1]]), [2.0])
    assert (frontier.accuracy.tolist(), frontier.cost.tolist(), frontier.thresholds.tolist()) == (
        [0.75],
        [2.0],
        [[0.0]],
    )


def test_a_grid_needs_policies():
    with pytest.raises(ValueError, match="`max_policies` is 0"):
        exact_frontier(*scores(20), max_policies=0)


def brute_force(confidences, correct, costs) -> set[tuple[float, float]]:
    """Accuracy and cost of all policies that none beats in both."""
    values = [np.unique([0.0, 1.0, *column]) for column in confidences[:, :-1].T]
    policies = np.array(list(itertools.product(*values)))
    points = set(zip(*(np.round(figure, 9) for figure in evaluate_policies(confidences, correct, costs, policies))))
    return {
        (accuracy, cost)
        for accuracy, cost in points
        if not any((a >= accuracy and c <= cost) and (a, c) != (accuracy, cost) for a, c in points)
    }


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 12),
    columns=st.integers(2, 4),
    seed=st.integers(0, 10**6),
    distinct=st.sampled_from([3, 10, 1000]),
)
def test_the_frontier_is_that_of_brute_force(n, columns, seed, distinct):
    """Confidences of 0 and 1 and equal ones among them."""
    rng = np.random.default_rng(seed)
    confidences = rng.integers(0, distinct + 1, (n, columns)) / distinct
    correct = rng.random((n, columns)) < 0.6
    costs = np.cumsum(rng.integers(0, 3, columns) + np.eye(columns, dtype=int)[0])
    frontier = exact_frontier(confidences, correct, costs)
    assert set(zip(np.round(frontier.accuracy, 9), np.round(frontier.cost, 9))) == brute_force(
        confidences, correct, costs
    )
    assert (np.diff(frontier.cost) > 0).all()
    assert (np.diff(frontier.accuracy) > 0).all()


def test_what_the_frontier_says_is_what_its_thresholds_give():
    """More samples than the grid has values, and another grid."""
    confidences, correct, costs = scores(n=1000, columns=4)
    for polish in (False, True):
        frontier = exact_frontier(confidences, correct, costs, max_policies=20**3, polish=polish)
        accuracy, cost = evaluate_policies(confidences, correct, costs, frontier.thresholds)
        assert frontier.accuracy == pytest.approx(accuracy)
        assert frontier.cost == pytest.approx(cost)
        assert (np.diff(frontier.cost) > 0).all()
        assert (np.diff(frontier.accuracy) > 0).all()


def assert_between_scores(scores: np.ndarray, thresholds: np.ndarray, low: float = 0.0) -> None:
    """Each threshold is as far from both neighbours as a number of float32 can be, or at an end."""
    values = np.unique([low, *scores, 1.0])
    for threshold in np.unique(thresholds):
        assert threshold == np.float32(threshold)
        if threshold not in (0.0, 1.0):
            above = np.searchsorted(values, threshold)
            assert values[above - 1] < threshold < values[above]
            distance = threshold - values[above - 1], values[above] - threshold
            assert distance[0] == pytest.approx(distance[1], abs=2 * float(np.spacing(np.float32(threshold))))
        else:
            assert threshold == 1.0 or 0.0 not in scores


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 40),
    seed=st.integers(0, 10**6),
    distinct=st.sampled_from([3, 10, 1000, 2**24]),
    most=st.sampled_from([4, 30, 10**6]),
)
def test_thresholds_lie_halfway_between_scores(n, seed, distinct, most):
    """Of every search, polished or not; among the scores are 0 and 1, equal ones, and neighbours in float32."""
    rng = np.random.default_rng(seed)
    confidences = (rng.integers(0, distinct + 1, (n, 3)) / distinct).astype(np.float32)
    table = confidences, rng.random((n, 3)) < 0.6, np.array([0.3, 0.6, 1.0])
    frontier = exact_frontier(*table, max_policies=most)
    found = genetic_search(*table, threshold_range=0.9, generations=3, population_size=6, seed=seed, progress=False)
    for column in range(2):
        assert_between_scores(confidences[:, column], frontier.thresholds[:, column])
        assert_between_scores(confidences[:, column], np.array(found.thresholds)[[column]], low=0.1)
    surest = np.maximum.accumulate(confidences[:, :2], axis=1)
    assert_between_scores(surest.ravel(), shared_threshold_frontier(*table).thresholds[:, 0])
    assert evaluate_policies(*table, np.array([found.thresholds])) == ([found.accuracy], [found.cost])


def test_scores_that_differ_in_their_last_digits_exit_alike():
    confidences, correct, costs = scores(n=300)
    confidences = confidences.astype(np.float32)
    gap = min(np.diff(np.unique(column)).min() for column in confidences.T)
    moved = np.clip(confidences + np.random.default_rng(1).uniform(-0.4, 0.4, confidences.shape) * gap, 0, 1)
    found = genetic_search(confidences, correct, costs, generations=10, progress=False)
    for policies in (exact_frontier(confidences, correct, costs).thresholds, np.array([found.thresholds])):
        before, after = (answering_column(values, policies) for values in (confidences, moved))
        assert np.array_equal(before, after)


def test_polishing_loses_nothing():
    rough, polished = (exact_frontier(*scores(n=1000), max_policies=20**2, polish=polish) for polish in (False, True))
    for accuracy, cost in zip(rough.accuracy, rough.cost):
        assert polished.accuracy[polished.cost <= cost + 1e-9].max() >= accuracy
    exact = exact_frontier(*scores(n=1000), max_policies=1002**2)
    gaps = [
        [
            exact.accuracy[exact.cost <= cost + 1e-9].max() - accuracy
            for accuracy, cost in zip(found.accuracy, found.cost)
        ]
        for found in (rough, polished)
    ]
    assert 0 <= max(gaps[1]) < 0.002 < max(gaps[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_nowhere_below_the_genetic_search(seed):
    confidences, correct, costs = scores(n=1000, columns=4, seed=seed)
    frontier = exact_frontier(confidences, correct, costs)
    for beta in (0.1, 0.5, 2.0):
        found = genetic_search(confidences, correct, costs, beta=beta, seed=seed, generations=50, progress=False)
        affordable = frontier.accuracy[frontier.cost <= found.cost + 1e-9]
        assert affordable.max() >= found.accuracy - 1e-9


def test_a_grid_of_two_values_is_polished_too():
    confidences, correct, costs = scores(n=100)
    frontier = exact_frontier(confidences, correct, costs, max_policies=4)
    assert frontier.cost == pytest.approx(evaluate_policies(confidences, correct, costs, frontier.thresholds)[1])


def test_nobody_beats_the_oracle():
    """It is the frontier where confidence says what is right, but for samples that are right nowhere."""
    confidences, correct, costs = scores()
    accuracy, cost = oracle_policy(correct, costs)
    frontier = exact_frontier(correct.astype(float), correct, costs)
    assert frontier.accuracy[-1] == pytest.approx(accuracy)
    nowhere = (~correct.any(axis=1)).mean()
    assert frontier.cost[-1] - cost == pytest.approx(nowhere * (costs[-1] - costs[0]))
    found = exact_frontier(confidences, correct, costs)
    assert found.accuracy.max() <= accuracy
    assert found.cost[found.accuracy >= accuracy - 1e-9].min(initial=np.inf) >= cost


@pytest.mark.parametrize("seed", range(5))
def test_at_no_accuracy_is_a_policy_cheaper_than_the_oracle(seed):
    """Small enough to try every answer of every sample."""
    rng = np.random.default_rng(seed)
    correct, costs = rng.random((5, 3)) < 0.5, np.array([1.0, 1.5, 4.0])
    answers = np.array(list(itertools.product(range(3), repeat=5)))
    right = correct[np.arange(5), answers].mean(axis=1)
    for asked in (0.0, 0.2, 0.5, 0.6, 0.99):
        accuracy, cost = oracle_policy(correct, costs, asked)
        reached = min(asked, right.max())
        assert accuracy >= reached - 1e-9
        assert cost == pytest.approx(costs[answers[right >= reached - 1e-9]].mean(axis=1).min())


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40), columns=st.integers(2, 4), seed=st.integers(0, 10**6), distinct=st.sampled_from([3, 1000])
)
def test_one_threshold_for_all_is_that_of_brute_force(n, columns, seed, distinct):
    rng = np.random.default_rng(seed)
    confidences = rng.integers(0, distinct + 1, (n, columns)) / distinct
    correct = rng.random((n, columns)) < 0.6
    costs = np.arange(1.0, columns + 1)
    values = np.unique([0.0, 1.0, *confidences.ravel()])
    everything = np.repeat(values[:, None], columns, axis=1)
    points = set(zip(*(np.round(figure, 9) for figure in evaluate_policies(confidences, correct, costs, everything))))
    best = {p for p in points if not any(a >= p[0] and c <= p[1] and (a, c) != p for a, c in points)}
    found = shared_threshold_frontier(confidences, correct, costs)
    assert set(zip(np.round(found.accuracy, 9), np.round(found.cost, 9))) == best
    assert (found.thresholds[:, :-1] == found.thresholds[:, :1]).all()
