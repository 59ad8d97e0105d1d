import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from hf_scan import ExitConfig, calibrate
from hf_scan.calibration import (
    ExitTable,
    RiskBound,
    answering_column,
    certify,
    collect_exit_logits,
    evaluate_policies,
    exact_frontier,
    genetic_search,
    least_accuracy_to_ask,
    oracle_policy,
    shared_threshold_frontier,
)
from hf_scan.costs import count_macs

from ..conftest import random_scan_model


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
    with pytest.raises(ValueError, match="There are 1 thresholds for 3 columns"):
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


def test_a_grid_needs_policies():
    with pytest.raises(ValueError, match="`max_policies` is 0"):
        exact_frontier(*scores(20), max_policies=0)


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
    _, predictions = table.columns(ExitConfig(thresholds=[None, 0.5, 0.5]))
    assert (predictions[:, -1] == table.logits[:, 1:].mean(axis=1).argmax(-1)).all()


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


def test_pairs_of_images_and_labels(model):
    """As a list, a `TensorDataset`, and either in a `DataLoader`; labels of shape (1,) too."""
    rows = dataset()
    expected = collect_exit_logits(model, rows)
    pairs = [(row["pixel_values"], row["labels"]) for row in rows]
    tensors = TensorDataset(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]))
    single = [(image.numpy(), torch.tensor([label])) for image, label in pairs]
    for rows_given in (pairs, tensors, single, DataLoader(pairs, batch_size=7, shuffle=True), DataLoader(tensors)):
        table = collect_exit_logits(model, rows_given)
        assert np.array_equal(table.logits, expected.logits)
        assert np.array_equal(table.labels, expected.labels)
        assert table.fingerprint == expected.fingerprint
    loader = DataLoader(rows, batch_size=7, shuffle=True)
    assert np.array_equal(collect_exit_logits(model, loader).logits, expected.logits)
    assert calibrate(model, pairs, max_macs=7e6).rule == calibrate(model, rows, max_macs=7e6).rule


def test_empty_split(model):
    with pytest.raises(ValueError, match="The 'search' split is empty"):
        calibrate(model, [])


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


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (None, TypeError, "is a NoneType; expected a dataset with a length"),
        ("table.safetensors", TypeError, "is a str; expected a dataset"),
        ([], ValueError, "split is empty"),
        ([(torch.zeros(3, 16, 16), 1, 2)], TypeError, "rows of type tuple; expected dictionaries"),
        ([("cat.png", 1)], TypeError, "pairs of a str and a label; expected the image as a tensor"),
        ([(torch.zeros(3, 16, 16), "cat")], ValueError, "labels such as 'cat'; expected class indices, such as"),
        ([(torch.zeros(3, 16, 16), 0.5)], ValueError, r"labels of type float64 and shape \(1,\) for 1 images"),
        ([(torch.zeros(3, 16, 16), torch.ones(4))], ValueError, r"labels of type float32 and shape \(1, 4\)"),
        ([{"image": 1, "labels": 1}], ValueError, r"rows of \['image', 'labels'\]; expected `pixel_values`"),
        ([{"pixel_values": torch.zeros(3, 16, 16)}], ValueError, r"rows of \['pixel_values'\]; expected"),
        ([{"pixel_values": torch.zeros(3, 16, 16), "labels": "cat"}], ValueError, "labels such as 'cat'"),
    ],
)
def test_rows_that_will_not_do(model, rows, kind, message):
    with pytest.raises(kind, match=message):
        collect_exit_logits(model, rows)


def test_tables_that_are_none(model, tmp_path):
    table = collect_exit_logits(model, dataset(12))
    table.save(tmp_path / "new" / "search.safetensors")
    whole = (tmp_path / "new" / "search.safetensors").read_bytes()
    for number, content in enumerate((b"junk", whole[:-8], whole.replace(b"exit_table", b"exit_stool"))):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold a whole table of exit logits"):
            ExitTable.load(path)
    with pytest.raises(ValueError, match="do not belong together"):
        ExitTable(table.logits, table.labels[:5], table.samples, "search", table.model)
