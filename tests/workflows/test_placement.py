import dataclasses
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scan.calibration import exact_frontier
from hf_scan.workflows.placement import Problem, place_exits, placement_frontier
from hf_scan.workflows.verdict import break_even, verdict_of_costs, verdict_of_run, verdict_of_search


def problem_of(accuracies, n=300, seed=0, heads=0.01, stages=None, noise=0.1) -> Problem:
    """
    Candidates that get the easiest images right and are surest of these; the last column is the deepest exit.
    """
    rng = np.random.default_rng(seed)
    count = len(accuracies)
    difficulty = rng.permutation(n) / n
    scores = np.empty((n, count))
    for column, accuracy in enumerate(accuracies):
        scores[:, column] = np.clip(1 - 0.5 * difficulty / accuracy + noise * rng.normal(size=n), 0.01, 0.999)
    correct = difficulty[:, None] < np.array(accuracies)
    stages = np.full(count, 1 / count) if stages is None else np.array(stages)
    return Problem(scores, correct, stages, np.array([heads] * (count - 1) + [0.0]), correct[:, -1])


def test_costs_count_the_heads_that_are_there():
    stages, heads = np.array([0.1, 0.2, 0.3, 0.3]), np.array([1, 2, 3, 0.1])
    problem = Problem(np.zeros((1, 4)), np.zeros((1, 4)), stages, heads, np.zeros(1))
    assert problem.cumulative([]) == pytest.approx([1.0])
    assert problem.cumulative([1]) == pytest.approx([2.3, 3.0])
    assert problem.cumulative([0, 2]) == pytest.approx([1.1, 4.6, 5.0])


@given(seed=st.integers(0, 1000), max_exits=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_frontier_is_that_of_all_subsets(seed, max_exits):
    """No subset and no thresholds on it beat the frontier by more than what a further exit has to be worth."""
    problem = problem_of([0.4, 0.6, 0.7, 0.9], n=24, seed=seed)
    frontier = placement_frontier(problem, max_exits)
    accuracy, cost = problem.evaluate(frontier.thresholds)
    assert accuracy == pytest.approx(frontier.accuracy)
    assert cost == pytest.approx(frontier.cost)
    assert (~np.isnan(frontier.thresholds[:, :-1])).sum(axis=1).max() <= max_exits
    for count in range(max_exits + 1):
        for exits in itertools.combinations(range(3), count):
            columns = [*exits, 3]
            other = exact_frontier(
                problem.scores[:, columns], problem.correct[:, columns], problem.cumulative(exits), 5000, polish=False
            )
            for right, price in zip(other.accuracy, other.cost):
                assert frontier.cost[frontier.accuracy >= right - 1e-12].min() <= price * 1.01**count + 1e-12


def test_a_fourth_exit_is_grown():
    problem = problem_of([0.2, 0.4, 0.6, 0.8, 0.95], heads=0.0)
    problem = dataclasses.replace(problem, scores=np.where(problem.correct, 0.9, 0.1))  # so that a coarse grid is fine
    most = [(~np.isnan(placement_frontier(problem, count).thresholds[:, :-1])).sum(axis=1).max() for count in (3, 4)]
    assert most == [3, 4]


def test_a_strong_exit_is_chosen_and_a_dear_one_is_not():
    problem = problem_of([0.5, 0.9, 0.92], heads=0.01, stages=[0.3, 0.3, 0.4], noise=0.02)
    placement = place_exits(problem, 2, 1.0)
    assert 1 in placement.exits
    assert placement.cost < 0.8
    assert placement.fitted_cost == pytest.approx(placement.cost, abs=0.15)
    assert placement.oracle_cost < placement.cost
    assert len(placement.alone) == 2
    assert placement.alone[1] < placement.alone[0]
    dear = Problem(problem.scores, problem.correct, problem.stages, np.array([0.8, 0.8, 0.0]), problem.baseline)
    placement = place_exits(dear, 2, 1.0)
    assert placement.exits == []
    assert (placement.cost, placement.fitted_cost) == (1.0, 1.0)


def test_the_estimate_is_of_other_samples():
    """Where scores know nothing, choices look good on the samples that made them only."""
    drops, own, margins = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scores, correct = rng.random((60, 6)), rng.random((60, 6)) < 0.7
        heads = np.array([0.01] * 5 + [0.0])
        problem = Problem(scores, correct, np.full(6, 1 / 6), heads, correct[:, -1])
        placement = place_exits(problem, 3, 0.0)
        drops.append(placement.fitted_drop)
        own.append(100 * (problem.baseline.mean() - placement.accuracy))
        margins.append(placement.accuracy_margin)
    assert max(own) <= 1e-9
    assert np.mean(drops) > np.mean(own) + 1
    assert np.mean(margins) > 1
    sure = problem_of([0.8, 0.9, 0.92], noise=0.0)
    assert place_exits(sure, 2, 1.0).accuracy_margin < 1


def test_what_may_be_lost_counts_against_the_plain_network():
    """Which is not the deepest exit where the network was trained further: a weaker one allows more to leave."""
    problem = problem_of([0.8, 0.9, 0.95], noise=0.0)
    weaker = replace(problem, baseline=problem.correct[:, 1])
    own, plain = (place_exits(one, 2, 0.0) for one in (problem, weaker))
    assert plain.cost < own.cost
    assert own.accuracy >= problem.correct[:, 2].mean() > plain.accuracy >= problem.correct[:, 1].mean()


def test_break_even_is_where_costs_are_equal():
    for cost, head in ((0.3, 0.05), (0.9, 0.2)):
        share = break_even(cost, head)
        assert share * cost + (1 - share) * (1 + head) == pytest.approx(1)
    assert break_even(1.2, 0.1) == float("inf")


def test_verdict_of_a_run_names_the_exit_that_holds_it_back():
    accuracies = [0.5, 0.7, 0.9]

    def judged(speedup, shares, heads):
        return verdict_of_run(speedup, 0.5, accuracies, shares, costs=[0.3, 0.6], heads=heads)

    assert judged(1.4, [0.5, 0.2], [0.01, 0.01]).answer == "pays"
    off = judged(1.0, [0.0, 0.0], [0.0, 0.0])
    assert off.answer == "does not pay"
    assert "all exits are off" in off.reason
    assert "exit 1, is 20.0 points less accurate" in off.reason
    # Exit 0 saves 0.1 * 0.7 for a head of 0.2; exit 1 saves 0.3 * 0.4 for 0.9 * 0.01.
    dear = judged(0.9, [0.1, 0.3], [0.2, 0.01])
    assert "Exit 0 is too dear" in dear.reason
    assert "its head costs 20.0%" in dear.reason
    weak = judged(1.03, [0.02, 0.02], [0.001, 0.001])
    assert weak.answer == "may pay"
    assert "4% of the images leave early" in weak.reason


def test_verdicts_say_why():
    assert verdict_of_costs(["a", "b"], [0.95, 0.97], [0.01, 0.01]).answer == "does not pay"
    assert "heads are too dear" in verdict_of_costs(["a"], [0.905], [0.9]).reason
    verdict = verdict_of_costs(["a", "b"], [0.5, 0.7], [0.1, 0.01])
    assert verdict.answer == "may pay"
    assert "2.00 times" in verdict.reason
    assert "at b it takes 3.2%" in verdict.reason

    def judged(speedup, alone, heads, **given):
        chosen = ["b"] if speedup > 1 else []
        return verdict_of_search(speedup, 0.5, ["a", "b"], [0.5, 0.7], alone, heads, 0.9, chosen, **given)

    assert judged(1.3, [1, 0.8], [0.01, 0.01]).answer == "pays"
    assert judged(1.3, [1, 0.8], [0.01, 0.01], lost=1.4, count=200).answer == "pays"
    overfitted = judged(1.3, [1, 0.8], [0.01, 0.01], lost=1.6, count=200)
    assert overfitted.answer == "may pay"
    assert "1.6 points are lost on images that did not choose the thresholds, where at most 0.5" in overfitted.reason
    assert judged(1.03, [1, 0.97], [0.01, 0.01]).answer == "may pay"
    weak = judged(0.99, [1.0, 0.99], [0.01, 0.01])
    assert weak.answer == "does not pay"
    assert "The best exit is b, and it is too weak: alone it is 20.0 points less accurate" in weak.reason
    assert "its head is too dear: -" not in judged(0.99, [1.0, 0.9], [0.2, 0.2]).reason
