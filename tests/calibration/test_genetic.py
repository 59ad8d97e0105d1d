import itertools

import numpy as np
import pytest

from hf_scan.calibration import (
    evaluate_policies,
    genetic_search,
)

from .samples import scores


@pytest.mark.parametrize("seed", range(3))
def test_genetic_search_finds_the_best_policy_it_can_express(seed):
    confidences, correct, costs = scores(seed=seed)
    found = genetic_search(confidences, correct, costs, bits=20, seed=seed, progress=False)
    grid = 1 - 0.3 * np.arange(21) / 20
    policies = np.array(list(itertools.product(grid, grid)))
    accuracy, cost = evaluate_policies(confidences, correct, costs, policies)
    best = (1 / cost + 0.5 * 100 * (accuracy - correct[:, -1].mean())).max()
    assert found.fitness <= best + 1e-9
    assert found.fitness > best - 0.02
    assert all(0.7 <= threshold <= 1 for threshold in found.thresholds[:-1])
    assert found.history == sorted(found.history)  # the best policy is never lost
    # What it says of its thresholds is what they give.
    assert evaluate_policies(confidences, correct, costs, np.array([found.thresholds])) == (
        pytest.approx([found.accuracy]),
        pytest.approx([found.cost]),
    )


def test_beta_trades_speed_for_accuracy():
    fast, exact = (genetic_search(*scores(), beta=beta, progress=False) for beta in (0.0, 10.0))
    assert fast.cost < exact.cost
    assert fast.accuracy < exact.accuracy


def test_the_same_seed_gives_the_same_thresholds_and_leaves_global_randomness_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first, second = (genetic_search(*scores(), generations=5, seed=3, progress=False) for _ in range(2))
    assert first == second
    assert (np.random.get_state()[1] == before).all()


def test_the_genetic_search_does_not_depend_on_the_unit_of_cost():
    confidences, correct, costs = scores()
    shares, macs = (
        genetic_search(confidences, correct, c, generations=20, progress=False) for c in (costs, costs * 4e7)
    )
    assert shares.thresholds == macs.thresholds
    assert shares.fitness == pytest.approx(macs.fitness)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("population_size", 1), ("bits", 0), ("beta", float("nan")), ("threshold_range", 2), ("generations", 0)],
)
def test_bad_settings_of_the_genetic_search(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` is {value}; expected a number from"):
        genetic_search(*scores(20), progress=False, **{setting: value})


def test_genetic_search_wants_confidences():
    confidences, correct, costs = scores(20)
    with pytest.raises(ValueError, match=r"lie between -.* Rescale them"):
        genetic_search(-confidences, correct, costs, progress=False)
