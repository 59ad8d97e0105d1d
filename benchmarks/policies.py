"""Ways to choose thresholds, on the same cached logits: what they cost, and whether they keep what they promise.

    python benchmarks/policies.py --model runs/cifar100 --dataset_name uoft-cs/cifar100 --image_column img \
        --label_column fine_label

`--model` is a folder that `examples/train.py` wrote; the logits of the images that it kept for the search and of the
test split are computed once, put together, and divided anew: each way chooses its thresholds on a part, so as to lose
at most 0, 0.5 or 1 point against the deepest exit there, and is judged on the rest, which chose nothing. How often it
loses more there is its violation rate. Then the certified bound: 1,000 times, policies are chosen on one random part,
certified on another, and judged on all images. Costs are MACs (or, with `--milliseconds`, those that the model's exit
configuration holds). Writes a table and a JSON file.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adaptive import load_splits
from sklearn.isotonic import IsotonicRegression
from tqdm import tqdm

from hf_scan import ExitConfig, RiskBound, ScanForImageClassification
from hf_scan.calibration import (
    CannotCertifyError,
    ExitTable,
    Frontier,
    certify,
    collect_exit_logits,
    evaluate_policies,
    exact_frontier,
    genetic_search,
    least_accuracy_to_ask,
    oracle_policy,
    shared_threshold_frontier,
)
from hf_scan.costs import CostModel, describe_machine


DROPS = (0.0, 0.5, 1.0)  # points that may be lost on the part that chooses
BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
# What no exit is sure about is answered by the deepest, as in the works compared with.
RULE = ExitConfig(fallback="deepest")
# Scores, whether they are right, and costs: a column for each exit.
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
Way = Callable[[Columns], Frontier]


def by_genetic_search(columns: Columns) -> Frontier:
    """The paper's, for several weights of accuracy."""
    found = [
        genetic_search(*columns, beta=beta, threshold_range=0.9, progress=False, population_size=40, generations=60)
        for beta in BETAS
    ]
    return Frontier.of(*columns, np.array([policy.thresholds for policy in found]))


def by_quotas(columns: Columns) -> Frontier:
    """MSDNet's (Huang et al., ICLR 2018): the shares that leave at the exits are a geometric series, whose ratio says
    how much is spent; each threshold lets that share of what is left go."""
    scores, _, costs = columns
    policies = []
    for ratio in np.geomspace(0.02, 50, 200):
        quotas = ratio ** np.arange(len(costs))
        quotas = quotas / quotas.sum()
        left = np.ones(len(scores), dtype=bool)
        thresholds = []
        for column, quota in enumerate(quotas[:-1]):
            count = min(round(quota * len(scores)), left.sum())
            values = np.sort(scores[left, column])[::-1]
            thresholds.append(1.0 if count == 0 else values[count] if count < len(values) else 0.0)
            left &= scores[:, column] <= thresholds[-1]
        policies.append([*thresholds, 0.0])
    return Frontier.of(*columns, np.array(policies))


def by_exact_frontier(columns: Columns) -> Frontier:
    return exact_frontier(*columns, max_policies=200_000)


def by_shared_threshold(columns: Columns) -> Frontier:
    """Shallow-Deep Networks' (Kaya et al., ICML 2019)."""
    return shared_threshold_frontier(*columns)


CROSS_FITTED = "exact frontier, cross-fitted"  # as `calibrate` does
WAYS: dict[str, tuple[str, Way]] = {
    CROSS_FITTED: ("confidence", by_exact_frontier),
    "exact frontier": ("confidence", by_exact_frontier),
    "exact frontier, margin": ("margin", by_exact_frontier),
    "genetic search (SCAN)": ("confidence", by_genetic_search),
    "geometric quotas (MSDNet)": ("confidence", by_quotas),
    "one threshold (Shallow-Deep)": ("confidence", by_shared_threshold),
    "patience (PABEE)": ("patience", by_shared_threshold),
    "one threshold, temperatures": ("temperature", by_shared_threshold),
    "exact frontier, temperatures": ("temperature", by_exact_frontier),
    "one threshold, isotonic": ("isotonic", by_shared_threshold),
}


class Scores:
    """The scores of all images by each criterion; those that are fitted, on the part that chooses."""

    def __init__(self, table: ExitTable, costs: np.ndarray) -> None:
        self.table = table
        self.costs = costs
        names = ("confidence", "margin", "patience")
        self.known = {name: self.of(ExitConfig(criterion=name)) for name in names}
        self.right = table.columns(RULE)[1][:, : table.num_exits] == table.labels[:, None]

    def of(self, exit_config: ExitConfig) -> np.ndarray:
        return self.table.columns(exit_config)[0][:, : self.table.num_exits]

    def columns(self, name: str, part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if name == "temperature":
            scores = self.of(ExitConfig(temperatures=temperatures(self.table.select(part))))
        elif name == "isotonic":
            scores = self.known["confidence"].copy()
            for column in range(scores.shape[1]):
                fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
                fitted.fit(scores[part, column], self.right[part, column])
                scores[:, column] = fitted.predict(scores[:, column])
        else:
            scores = self.known[name]
        return scores, self.right, self.costs


def cross_fitted(columns: Columns, least_accuracy: float, frontier: Frontier) -> float:
    asked = least_accuracy_to_ask(
        least_accuracy,
        columns[1][:, -1],
        lambda rows: exact_frontier(*some(columns, rows), max_policies=200_000, polish=False),
        lambda policies, rows: evaluate_policies(*some(columns, rows), policies)[0],
    )
    return min(asked, float(frontier.accuracy.max()))


def temperatures(table: ExitTable) -> list[float]:
    """That of each exit with the least cross-entropy (Guo et al., ICML 2017)."""
    labels = torch.from_numpy(table.labels)
    found = []
    for exit_index in range(table.num_exits):
        logits = torch.from_numpy(table.logits[:, exit_index])
        candidates = np.geomspace(0.25, 4, 41)
        losses = [float(torch.nn.functional.cross_entropy(logits / value, labels)) for value in candidates]
        found.append(float(candidates[int(np.argmin(losses))]))
    return found


def some(columns: Columns, rows: np.ndarray) -> Columns:
    scores, right, costs = columns
    return scores[rows], right[rows], costs


def compare(scores: Scores, deepest: np.ndarray, share: float, repeats: int, plain: float) -> Iterator[dict[str, Any]]:
    """Each way over random divisions."""
    rng = np.random.default_rng(0)
    n = len(deepest)
    divisions = [np.split(rng.permutation(n), [int(share * n)]) for _ in range(repeats)]
    for name, (criterion, way) in tqdm(WAYS.items(), desc="ways"):
        results: dict[float, list[tuple[float, float, bool]]] = {drop: [] for drop in DROPS}
        seconds = []
        for chooses, judges in tqdm(divisions, desc=name, leave=False):
            columns = scores.columns(criterion, chooses)
            started = time.perf_counter()
            frontier = way(some(columns, chooses))
            least = {drop: float(deepest[chooses].mean()) - drop / 100 for drop in DROPS}
            if name == CROSS_FITTED:
                least = {drop: cross_fitted(some(columns, chooses), least[drop], frontier) for drop in DROPS}
            seconds.append(time.perf_counter() - started)
            for drop in DROPS:
                fits = np.flatnonzero(frontier.accuracy >= least[drop] - 1e-12)
                if len(fits) == 0:
                    results[drop].append((plain, 0.0, False))  # it keeps to the plain network
                    continue
                accuracy, cost = evaluate_policies(*some(columns, judges), frontier.thresholds[fits[:1]])
                lost = 100 * (deepest[judges].mean() - accuracy[0])
                results[drop].append((float(cost[0]), float(lost), bool(lost > drop + 1e-9)))
        for drop, found in results.items():
            cost, lost, violated = (np.array(values) for values in zip(*found))
            yield {
                "way": name,
                "drop": drop,
                "cost": float(np.median(cost) / plain),
                "lost": float(np.median(lost)),
                "violations": float(violated.mean()),
                "seconds": float(np.median(seconds)),
            }


def certified(scores: Scores, deepest: np.ndarray, repeats: int, bounds: list[RiskBound]) -> Iterator[dict[str, Any]]:
    """
    How often what was certified does not hold, the images at hand being the whole world: parts are drawn from them
    with replacement, a third to choose and a third to certify.
    """
    columns = scores.columns("confidence", np.arange(len(deepest)))
    truths = {"gap": scores.right, "error": scores.right, "disagreement": agreement(scores.table)}
    for bound in bounds:
        rng = np.random.default_rng(1)
        violated, uncertified, costs = 0, 0, []
        world = (columns[0], truths[bound.loss], columns[2])
        compared = deepest if bound.loss == "gap" else np.ones(len(deepest), dtype=bool)
        for _ in tqdm(range(repeats), desc=f"certified {bound.loss}", leave=False):
            chooses, certifies = rng.integers(0, len(deepest), (2, len(deepest) // 3))
            frontier = exact_frontier(*some(world, chooses), max_policies=8000, polish=False)
            keeps = frontier.accuracy >= compared[chooses].mean() - bound.max_drop / 100
            keeps[-1] = True
            frontier = frontier.select(keeps)
            frontier = frontier.select(np.unique(np.linspace(0, len(frontier) - 1, 40, dtype=int)))
            try:
                found = certify(*some(world, certifies), frontier.thresholds, bound, baseline=deepest[certifies])
            except CannotCertifyError:
                uncertified += 1
                continue
            accuracy, cost = evaluate_policies(*world, frontier.thresholds[[found.policy]])
            violated += bool(100 * (compared.mean() - accuracy[0]) > bound.max_drop)
            costs.append(float(cost[0]))
        yield {
            "loss": bound.loss,
            "max_drop": bound.max_drop,
            "delta": bound.delta,
            "n": len(deepest) // 3,
            "repeats": repeats,
            "violations": violated / repeats,
            "uncertified": uncertified / repeats,
            "cost": float(np.median(costs)) if costs else None,
        }


def agreement(table: ExitTable) -> np.ndarray:
    """Whether each answer is the deepest exit's."""
    return table.columns(RULE)[1][:, : table.num_exits] == table.deepest[:, None]


def against_genetic(columns: Columns) -> Iterator[dict[str, float]]:
    """At the cost of each policy that the genetic search finds, the frontier's accuracy."""
    frontier = exact_frontier(*columns)
    for beta, seed in tqdm(list(itertools.product(BETAS, range(3))), desc="genetic search", leave=False):
        started = time.perf_counter()
        found = genetic_search(*columns, beta=beta, threshold_range=0.9, seed=seed, progress=False)
        seconds = time.perf_counter() - started
        best = frontier.accuracy[frontier.cost <= found.cost * (1 + 1e-12)].max()
        yield {
            "beta": beta,
            "seed": seed,
            "cost": found.cost,
            "genetic": found.accuracy,
            "frontier": float(best),
            "seconds": seconds,
        }


def seconds_of_the_frontier(columns: Columns) -> dict[str, float]:
    """Of the grid alone, and polished: medians of five."""
    seconds = {}
    for name, polish in (("grid", False), ("polished", True)):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            exact_frontier(*columns, polish=polish)
            times.append(time.perf_counter() - started)
        seconds[name] = statistics.median(times)
    return seconds


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = ScanForImageClassification.from_pretrained(arguments.model).eval()
    splits, dataset, seed = load_splits(arguments)
    search, test = (collect_exit_logits(model, splits[name], name) for name in ("search", "test"))
    if not arguments.milliseconds:
        model.exit_config = model.exit_config.replace(costs=None)
    cost_model = CostModel.of(model)
    costs = cost_model.cumulative(RULE)[: model.num_exits]
    table = ExitTable(
        *(np.concatenate([getattr(one, name) for one in (search, test)]) for name in ("logits", "labels", "samples")),
        split="search and test",
        model=search.model,
    )
    scores = Scores(table, costs)
    deepest = scores.right[:, model.num_exits - 1]
    rows = list(compare(scores, deepest, len(search) / len(table), arguments.repeats, cost_model.plain_image))
    everything = scores.columns("confidence", np.arange(len(table)))
    genetic = list(against_genetic(some(everything, np.arange(len(search)))))
    timed = np.random.default_rng(0).permutation(len(table))[:10_000]
    bounds = [
        RiskBound(1.0, 0.05, "gap"),
        RiskBound(1.0, 0.2, "gap"),
        RiskBound(3.0, 0.05, "disagreement"),
        RiskBound(100 * float(1 - deepest.mean()) + 1, 0.05, "error"),
    ]
    guarantees = list(certified(scores, deepest, arguments.certifications, bounds))
    accuracy, cost = oracle_policy(scores.right, costs)
    facts = {
        "model": model.config.backbone,
        "dataset": dataset,
        "seed": seed,
        "images": {"choose": len(search), "judge": len(test), "divisions": arguments.repeats},
        "costs": f"{cost_model.unit}; below as a share of the plain backbone's",
        "accuracy of the exits on all": scores.right.mean(axis=0).round(4).tolist(),
        f"seconds of the frontier, {len(timed)} images": seconds_of_the_frontier(some(everything, timed)),
        "oracle": {"accuracy": accuracy, "cost": cost / cost_model.plain_image},
        "machine": describe_machine(),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    head = ["", *(f"cost at {drop} | lost there | violated" for drop in DROPS), "seconds"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" + "|---:" * (3 * len(DROPS) + 1) + "|"]
    for name in WAYS:
        found = {row["drop"]: row for row in rows if row["way"] == name}
        cells = [f"{r['cost']:.3f} | {r['lost']:+.2f} | {r['violations']:.0%}" for r in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {found[DROPS[0]]['seconds']:.3f} |")
    lines += [
        "",
        "| guarantee | samples | of so many | violated | not certified | cost |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in guarantees:
        name = f"{row['loss']} of at most {row['max_drop']:.2f} points, delta {row['delta']}"
        spent = "" if row["cost"] is None else f"{row['cost'] / cost_model.plain_image:.3f}"
        cells = [name, row["n"], row["repeats"], f"{row['violations']:.1%}", f"{row['uncertified']:.1%}", spent]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += [
        "",
        "| beta | seed | cost | genetic search | frontier at that cost | seconds |",
        "|---:" * 6 + "|",
    ]
    for row in genetic:
        cells = [row["beta"], row["seed"], f"{row['cost'] / cost_model.plain_image:.3f}", f"{row['genetic']:.2%}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['frontier']:.2%}", f"{row['seconds']:.2f}"])) + " |")
    text = "\n".join(lines)
    values = {**facts, "ways": rows, "guarantees": guarantees, "genetic": genetic}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    arguments.output.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart"), help="folder of a trained network")
    parser.add_argument("--dataset_name", help="what the model was trained on; the quickstart's digits otherwise")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--milliseconds", action="store_true", help="costs as measured, from the exit configuration")
    parser.add_argument("--repeats", type=int, default=100, help="random divisions into a part to choose and the rest")
    parser.add_argument("--certifications", type=int, default=1000, help="random parts to certify on")
    parser.add_argument("--output", type=Path, default=Path("runs/policies"), help="files to write, without ending")
    main(parser.parse_args())
