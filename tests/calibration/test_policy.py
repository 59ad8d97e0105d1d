import numpy as np
import pytest

from hf_scan.calibration import (
    RiskBound,
    answering_column,
    certify,
    evaluate_policies,
    exact_frontier,
    genetic_search,
    shared_threshold_frontier,
)

from .samples import scores


def test_evaluate_policies_equals_a_loop():
    confidences, correct, costs = scores()
    policies = np.random.default_rng(1).random((20, 2))
    accuracy, cost = evaluate_policies(confidences, correct, costs, policies)
    for policy, expected in zip(policies, zip(accuracy, cost)):
        answers = answering_column(confidences, policy)
        rows = np.arange(len(answers))
        assert (correct[rows, answers].mean(), costs[answers].mean()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, r, k: (c, r[:, :2], k), "do not belong together"),
        (lambda c, r, k: (c, r, k[:2]), "do not belong together"),
        (lambda c, r, k: (c[:0], r[:0], k), "expected samples, and a column"),
        (lambda c, r, k: (np.where(c > 0.9, np.nan, c), r, k), "look for NaN in the logits"),
        (lambda c, r, k: (c, r, k * 0), "expected finite numbers above 0"),
        (lambda c, r, k: (c, r, k[::-1]), "do not decrease with depth"),
        (lambda c, r, k: (c, r + 1, k), "numbers other than 0 and 1"),  # predicted classes, say
        (lambda c, r, k: (c.astype(str), r, k), "expected an array of numbers"),
        (lambda c, r, k: (c, [[True, False], [True]], k), "is not an array of numbers"),
    ],
)
def test_bad_tables(change, message):
    table = change(*scores(20))
    for search in (
        exact_frontier,
        shared_threshold_frontier,
        lambda *table: genetic_search(*table, progress=False),
        lambda *table: certify(*table, np.zeros((1, 3)), RiskBound()),
    ):
        with pytest.raises(ValueError, match=message):
            search(*table)
