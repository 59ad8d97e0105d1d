import numpy as np
import pytest

from hf_scan.calibration import (
    evaluate_policies,
    exact_frontier,
    least_accuracy_to_ask,
)


def test_cross_fitting_tells_what_is_lost_elsewhere():
    """Of many draws, those that ask for more keep to what is wanted in the mean; the others do not."""
    rng = np.random.default_rng(0)
    skill = rng.normal(size=(20_000, 1)) + np.linspace(0.5, 1.2, 4)
    confidences = 1 / (1 + np.exp(-skill - 0.7 * rng.normal(size=(20_000, 4))))
    correct, costs = rng.random((20_000, 4)) < confidences, np.linspace(0.2, 1, 4)
    lost = {"asked": [], "wanted": []}
    for _ in range(25):
        rows = rng.permutation(20_000)[:600]
        part = confidences[rows], correct[rows]

        def frontier_of(some, part=part):
            return exact_frontier(part[0][some], part[1][some], costs, max_policies=10_000, polish=False)

        def accuracies_of(policies, some, part=part):
            return evaluate_policies(part[0][some], part[1][some], costs, policies)[0]

        wanted = part[1][:, -1].mean() - 0.01
        asked = least_accuracy_to_ask(wanted, part[1][:, -1], frontier_of, accuracies_of)
        assert wanted <= asked <= wanted + 0.03 + 1e-9
        frontier = frontier_of(np.arange(600))
        for name, least in (("asked", min(asked, frontier.accuracy.max())), ("wanted", wanted)):
            chosen = frontier.thresholds[np.flatnonzero(frontier.accuracy >= least - 1e-12)[0]]
            accuracy, _ = evaluate_policies(confidences, correct, costs, chosen)
            lost[name].append(100 * (correct[:, -1].mean() - accuracy[0]))
    assert np.mean(lost["wanted"]) > 1.4
    assert np.mean(lost["asked"]) < 1.2


def test_cross_fitting_needs_an_image_for_each_fold():
    with pytest.raises(ValueError, match="has 4 values; expected 5 or more"):
        least_accuracy_to_ask(0.5, np.ones(4, dtype=bool), None, None)
