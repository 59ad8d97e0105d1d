import itertools

import numpy as np
import pytest
import torch

from hf_scan import ExitConfig, calibrate
from hf_scan.calibration import ExitTable, answering_column, collect_exit_logits, evaluate_policies, genetic_search
from hf_scan.costs import count_macs

from .conftest import random_scan_model


def scores(n: int = 400, columns: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of varying difficulty; deeper columns are surer and right more often."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random((n, 1))
    confidences = np.clip(1 - difficulty * rng.random((n, columns)) * np.linspace(1, 0.4, columns), 0, 1)
    return confidences, rng.random((n, columns)) < confidences, np.linspace(0.4, 1.0, columns)


def test_answering_column_by_hand():
    confidences = np.array([[0.9, 0.2, 0.0], [0.5, 0.8, 0.0], [0.5, 0.5, 0.0]])
    assert answering_column(confidences, [0.7, 0.7]).tolist() == [0, 1, 2]
    assert answering_column(confidences, [0.5, 0.5]).tolist() == [0, 1, 2]  # above, not at
    assert answering_column(confidences, [None, 0.1]).tolist() == [1, 1, 1]
    many = answering_column(confidences, np.array([[0.7, 0.7], [0.0, 0.0], [1.0, 1.0]]))
    assert many.tolist() == [[0, 1, 2], [0, 0, 0], [2, 2, 2]]
    with pytest.raises(ValueError, match="There are 1 thresholds for 2 columns"):
        answering_column(confidences, [0.5])


def test_evaluate_policies_equals_a_loop():
    confidences, correct, costs = scores()
    policies = np.random.default_rng(1).random((20, 2))
    accuracy, cost = evaluate_policies(confidences, correct, costs, policies)
    for policy, expected in zip(policies, zip(accuracy, cost)):
        answers = answering_column(confidences, policy)
        rows = np.arange(len(answers))
        assert (correct[rows, answers].mean(), costs[answers].mean()) == pytest.approx(expected)


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
    assert all(0.7 <= threshold <= 1 for threshold in found.thresholds)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, r, k: (c, r[:, :2], k), "do not belong together"),
        (lambda c, r, k: (c, r, k[:2]), "do not belong together"),
        (lambda c, r, k: (c[:0], r[:0], k), "expected samples and two columns"),
        (lambda c, r, k: (np.where(c > 0.9, np.nan, c), r, k), "look for NaN in the logits"),
        (lambda c, r, k: (c, r, k * 0), "costs above 0"),
    ],
)
def test_bad_tables(change, message):
    with pytest.raises(ValueError, match=message):
        genetic_search(*change(*scores(20)), progress=False)


def dataset(n: int = 70, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 5} for i in range(n)]


def test_table_holds_what_the_network_says(model, tmp_path):
    table = collect_exit_logits(model, dataset(), batch_size=32)
    with torch.no_grad():
        exit_logits = model(torch.stack([row["pixel_values"] for row in dataset()])).exit_logits
    np.testing.assert_allclose(table.logits, torch.stack(exit_logits, 1).numpy(), rtol=1e-4, atol=1e-5)
    assert table.labels.tolist() == [row["labels"] for row in dataset()]
    assert not model.training

    table.save(tmp_path / "search.safetensors")
    loaded = ExitTable.load(tmp_path / "search.safetensors")
    assert (loaded.split, loaded.fingerprint) == ("search", table.fingerprint)
    assert np.array_equal(loaded.logits, table.logits)
    # The fingerprint is the images': it does not depend on how they were batched, and other images have another.
    assert collect_exit_logits(model, dataset(), batch_size=70).fingerprint == table.fingerprint
    assert collect_exit_logits(model, dataset(seed=1)).fingerprint != table.fingerprint


def test_table_columns_leave_switched_off_exits_out_of_the_ensemble(model):
    table = collect_exit_logits(model, dataset())
    _, correct = table.columns(ExitConfig(thresholds=[None, 0.5, 0.5]))
    ensemble = table.logits[:, 1:].mean(axis=1).argmax(-1) == table.labels
    assert (correct[:, -1] == ensemble).all()


@pytest.mark.parametrize("fallback", ["ensemble", "deepest"])
def test_calibrate_predicts_what_predict_adaptive_does(fallback):
    """Accuracy and cost that the search promises are those of real answers on the same images."""
    model = random_scan_model()
    config = calibrate(model, dataset(), fallback=fallback, threshold_range=0.7, beta=0.02, progress=False)
    answer = model.predict_adaptive(torch.stack([row["pixel_values"] for row in dataset()]), config)
    labels = torch.tensor([row["labels"] for row in dataset()])
    assert len(answer.exit_index.unique()) > 1
    assert config.search["accuracy"] == pytest.approx(float((answer.logits.argmax(-1) == labels).float().mean()))
    costs = torch.tensor(count_macs(model).relative())
    assert config.search["cost"] == pytest.approx(float(costs[answer.exit_index].mean()), rel=1e-5)
    assert config.search["n"] == 70
    assert len(config.thresholds) == (3 if fallback == "ensemble" else 2)
    assert config.fallback == fallback


def test_half_precision_models_and_images(model):
    table = collect_exit_logits(random_scan_model().half(), dataset())
    assert table.logits.dtype == np.float32
    # Half precision has three digits.
    assert np.abs(table.logits - collect_exit_logits(model, dataset()).logits).mean() < 0.05


def test_empty_split(model):
    with pytest.raises(ValueError, match="The 'search' split is empty"):
        calibrate(model, [])
