"""What is lost on other images when the same few choose exits and thresholds, and what keeps that to the target.

    python benchmarks/placement_margin.py --equip runs/trashnet_equip --data trashnet --holdout 0.2 --repeats 40

`--equip` is a folder that `hf-scan equip` wrote: its network has an exit at every candidate. The images that it was
not trained on, search and test images together, are divided many times at random: some choose exits and thresholds,
all others say what these lose against the network that was brought. Three ways to choose are compared, at the same
target:

- *thresholds*: cross-fitting knows of the choice of thresholds alone (`calibrate` without an `accuracy_margin`);
- *both*: with the margin that the choice of exits and thresholds together needs (`ExitSearch.accuracy_margin`), as
  `equip` does;
- *apart*: one half of the choosing images for the exits, the other for the thresholds.

Costs are MACs, so that the result is the same on any machine.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from readme_results import margin_table
from tqdm import tqdm

from hf_scan import ExitConfig, ScanForImageClassification, calibrate
from hf_scan.calibration import ExitTable, collect_exit_logits
from hf_scan.costs import describe_machine
from hf_scan.data import eval_transform
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.workflows.candidates import keep_exits
from hf_scan.workflows.data_arguments import DataArguments, load_splits, title
from hf_scan.workflows.equip import STEPS
from hf_scan.workflows.part_costs import costs_of_parts
from hf_scan.workflows.search_exits import ExitSearch, choose_exits


RESULTS = Path("benchmarks/results/placement_margin.json")


@dataclass(frozen=True)
class Answers:
    """What all candidates answer on some images, and what the network that was brought does."""

    table: ExitTable
    plain: ExitTable

    @property
    def plain_accuracy(self) -> float:
        return self.plain.baseline_accuracy

    def select(self, rows: np.ndarray) -> "Answers":
        return Answers(self.table.select(rows), self.plain.select(rows))


@dataclass(frozen=True)
class Policy:
    """Exits with their thresholds; no network where no exit pays."""

    points: list[str]
    small: ScanForImageClassification | None
    config: ExitConfig


class Choosing:
    """
    A network with an exit at every candidate, whose exits and thresholds are chosen on some of its images.

    Args:
        folder (`Path`): Of a run of `hf-scan equip`.
        max_exits (`int`): The most exits that are chosen.
        drop (`float`): Points that may be lost against the network that was brought.
    """

    def __init__(self, folder: Path, max_exits: int, drop: float) -> None:
        steps = folder / STEPS
        self.plain = ScanForImageClassification.from_pretrained(steps / "search" / "model").eval()
        joint = steps / "joint" / "model"
        self.model = ScanForImageClassification.from_pretrained(joint).eval() if joint.is_dir() else self.plain
        self.max_exits, self.drop = max_exits, drop
        self.costs = costs_of_parts(self.model)
        self.points = list(self.model.config.exit_points or [])

    def answers(self, images: Any, split: str) -> Answers:
        """Return what the candidates and the network that was brought answer."""
        table = collect_exit_logits(self.model, images, split)
        return Answers(table, table if self.model is self.plain else collect_exit_logits(self.plain, images, split))

    def choose(self, rows: Answers) -> dict[str, Policy]:
        """Return what each way of choosing gives."""
        found, count = self._placed(rows), len(rows.table) // 2
        exits, thresholds = rows.select(np.arange(count)), rows.select(np.arange(count, 2 * count))
        return {
            "thresholds": self._calibrated(rows, found.exit_points),
            "both": self._calibrated(rows, found.exit_points, found.accuracy_margin),
            "apart": self._calibrated(thresholds, self._placed(exits).exit_points),
        }

    def judge(self, policy: Policy, rows: Answers) -> tuple[float, float]:
        """Return the points lost and the cost, as a share of the plain network's, on other images."""
        if policy.small is None:
            right, cost = rows.plain_accuracy, 1.0
        else:
            table = self._table(rows.table, policy.small, policy.points)
            right = float((table.predictions(policy.config) == table.labels).mean())
            shares = costs_of_parts(policy.small).shares
            cost = float(np.dot(table.exit_shares(policy.config), shares.cumulative(policy.config)))
        return 100 * (rows.plain_accuracy - right), cost

    def _placed(self, rows: Answers) -> ExitSearch:
        return choose_exits(self.model, rows.table, self.costs, self.max_exits, self.drop, plain=rows.plain)

    def _calibrated(self, rows: Answers, points: list[str], margin: float = 0.0) -> Policy:
        if not points:
            return Policy(points, None, ExitConfig())
        small = keep_exits(self.model, points).eval()
        table = self._table(rows.table, small, points)
        least = rows.plain_accuracy - self.drop / 100
        return Policy(
            points, small, calibrate(small, table, min_accuracy=least, accuracy_margin=margin, fallback="deepest")
        )

    def _table(self, table: ExitTable, small: ScanForImageClassification, points: list[str]) -> ExitTable:
        """Return the answers of the exits that were kept."""
        columns = [*(self.points.index(point) for point in points), len(self.points)]
        return replace(table, logits=table.logits[:, columns], model=small.fingerprint())


def compare(choosing: Choosing, answers: Answers, count: int, repeats: int) -> list[dict[str, Any]]:
    """Return what each way of choosing on so many images loses and costs on all others, over random divisions."""
    found: dict[str, list[tuple[float, float]]] = {}
    for repeat in tqdm(range(repeats), desc=f"{count} images choose"):
        order = np.random.default_rng(repeat).permutation(len(answers.table))
        chooses, judges = answers.select(order[:count]), answers.select(order[count:])
        for name, policy in choosing.choose(chooses).items():
            found.setdefault(name, []).append(choosing.judge(policy, judges))
    rows = []
    for name, pairs in found.items():
        lost, costs = zip(*pairs)
        rows.append(
            {
                "cross_fitting": name,
                "images": count,
                "lost": statistics.mean(lost),
                "spread": statistics.stdev(lost),
                "cost": statistics.mean(costs),
            }
        )
    return rows


def main(arguments: argparse.Namespace) -> None:
    facts = json.loads((arguments.equip / "metrics.json").read_text(encoding="utf-8"))
    choosing = Choosing(arguments.equip, arguments.max_exits, arguments.drop)
    data = DataArguments(dataset_name=arguments.data, holdout=arguments.holdout)
    splits = load_splits(data, facts["seed"], validate=False)  # those of the run
    pool = concatenate_datasets([splits["search"], splits["test"]])
    images = pool.with_transform(eval_transform(create_image_processor(choosing.model)))
    answers = choosing.answers(images, "search and test")
    result = {
        "backbone": choosing.model.config.backbone,
        "dataset": title(arguments.data),
        "n": len(answers.table),
        "repeats": arguments.repeats,
        "max_accuracy_drop": arguments.drop,
        "max_exits": arguments.max_exits,
        "exit_points": choosing.points,
        "accuracies": (answers.table.logits.argmax(-1) == answers.table.labels[:, None]).mean(axis=0).tolist(),
        "machine": describe_machine(),
        "rows": [row for count in arguments.images for row in compare(choosing, answers, count, arguments.repeats)],
    }
    known = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    known[arguments.name or arguments.equip.name] = result
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(margin_table(known))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equip", type=Path, required=True, help="folder of a run of `hf-scan equip`")
    parser.add_argument("--data", required=True, help="the images of the run")
    parser.add_argument("--holdout", type=float, default=0.25, help="as in the run")
    parser.add_argument("--max_exits", type=int, default=4)
    parser.add_argument("--drop", type=float, default=0.5, help="points that may be lost")
    parser.add_argument("--images", type=int, nargs="+", default=[400], help="how many choose")
    parser.add_argument("--repeats", type=int, default=40, help="random divisions")
    parser.add_argument("--name", help="of the run in the results; its folder's otherwise")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    main(parser.parse_args())
