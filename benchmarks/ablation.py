"""What each part of SCAN, and each way of training, adds: one network and recipe, one thing changed at a time.

    python benchmarks/ablation.py parts --dataset_name uoft-cs/cifar100 --output_dir runs/ablation --use_cpu
    python benchmarks/ablation.py methods --dataset_name uoft-cs/cifar100 --output_dir runs/ablation --use_cpu

`parts` leaves out one part of the method at a time (ResNet-20, the paper's weights); `methods` changes one thing about
the training at a time (ResNet-18 of a quarter of the width, the fast recipe). Every run is one of `examples/train.py`,
whose flags may follow; those that a run folder has the figures of are not run again, so that an interrupted benchmark
goes on. The defaults are for a CPU; on a GPU: `--max_train_samples 45000 --epochs 200` in place of `--use_cpu`.
Accuracies are those of the test split, which chose nothing. The table goes into `benchmarks/results/ablation.json`, in
place of an earlier one of the same suite.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
# "alpha = 0" in the paper's words: the labels alone, with their full weight.
LABELS_ONLY = ["--label_weight", "1", "--soft_label_weight", "0"]
QUARTER_WIDE = ["--backbone_kwargs", '{"channels": [16, 32, 64, 128]}']


@dataclass(frozen=True)
class Suite:
    """Runs to compare: a recipe with the flags of all, the flags of each, and the sizes for a CPU."""

    recipe: str
    flags: list[str]
    variants: dict[str, list[str]]
    max_train_samples: int
    epochs: int


SUITES = {
    "parts": Suite(
        recipe="cifar100_resnet20.yaml",
        flags=["--distillation_preset", "paper"],
        variants={
            "all": [],
            "without attention": ["--attention_type", "none"],
            "without distillation": LABELS_ONLY,
            "without hint": ["--hint_weight", "0"],
            "none of them": ["--attention_type", "none", *LABELS_ONLY, "--hint_weight", "0"],
        },
        max_train_samples=15_000,
        epochs=10,
    ),
    "methods": Suite(
        recipe="cifar100_fast_resnet18.yaml",
        flags=[*QUARTER_WIDE, "--distillation_preset", "successor"],
        variants={
            "joint": [],
            "without soft labels": LABELS_ONLY,
            "without label smoothing": ["--label_smoothing_factor", "0"],
            "late soft labels": ["--distillation_warmup_steps", "0.5"],
            "ensemble as teacher, late": [
                *("--distillation_teacher", "ensemble", "--distillation_warmup_steps", "0.5")
            ],
            "gradient equilibrium": ["--gradient_equilibrium"],
            "backbone first (mixed regime)": ["--backbone_steps", "0.4"],
        },
        max_train_samples=45_000,
        epochs=9,
    ),
}


def accuracies(folder: Path, flags: list[str]) -> dict[str, float]:
    """Accuracies of a run by name of the exit; the run is made unless it is there."""
    if not (folder / "metrics.json").is_file():
        command = [sys.executable, str(ROOT / "examples" / "train.py"), *flags, "--output_dir", str(folder)]
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise RuntimeError(f"A run failed; {log} says why.")
    rows = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rows"]
    return {row["name"].split(" (")[0]: row["accuracy"] for row in rows if row["name"].startswith(("exit", "ensem"))}


def row_of(name: str, flags: list[str], runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return what a variant gave, by exit: the mean over the seeds and the range."""
    columns = {exit_name: [run[exit_name] for run in runs] for exit_name in runs[0]}
    return {
        "variant": name,
        "flags": flags,
        "mean": {exit_name: statistics.mean(column) for exit_name, column in columns.items()},
        "range": {exit_name: [min(column), max(column)] for exit_name, column in columns.items()},
    }


def table_of(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table, in percent."""
    exits = list(result["rows"][0]["mean"])
    lines = ["| | " + " | ".join(exits) + " |", "|---|" + "---:|" * len(exits)]
    for row in result["rows"]:
        cells = [f"{100 * row['mean'][name]:.2f}" for name in exits]
        if len(result["seeds"]) > 1:
            ends = [[100 * end for end in row["range"][name]] for name in exits]
            cells = [f"{cell} ({low:.2f} to {high:.2f})" for cell, (low, high) in zip(cells, ends)]
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    header = (
        f"`{result['backbone']}` on {result['dataset']}: test accuracy in %, mean (and range) of seeds "
        f"{result['seeds']}; images: {result['splits']}; {result['epochs']} epochs. {result['machine']}."
    )
    return "\n".join([header, "", *lines])


def keep(result: dict[str, Any], path: Path) -> None:
    """Write a suite's result, in place of an earlier one."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[result["suite"]] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def main(arguments: argparse.Namespace, further: list[str]) -> None:
    suite = SUITES[arguments.suite]
    samples, epochs = arguments.max_train_samples or suite.max_train_samples, arguments.epochs or suite.epochs
    shared = [
        *(str(ROOT / "examples" / "recipes" / suite.recipe), "--dataset_name", arguments.dataset_name),
        *("--max_train_samples", str(samples), "--num_train_epochs", str(epochs)),
        *("--save_strategy", "no", "--disable_tqdm", "true", *suite.flags, *further),
    ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in suite.variants}
    # A name for each setting, so that no figure is taken for another's.
    folders = Path(arguments.output_dir, f"{arguments.suite}_{samples}x{epochs}")
    with tqdm(total=len(suite.variants) * len(arguments.seeds)) as progress:
        for seed in arguments.seeds:
            for name, flags in suite.variants.items():
                progress.set_description(f"{name}, seed {seed}")
                folder = folders / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
                found[name].append(accuracies(folder, [*shared, *flags, "--seed", str(seed)]))
                progress.update()
    first = folders / f"{next(iter(suite.variants))}_{arguments.seeds[0]}"
    facts = json.loads((first / "metrics.json").read_text(encoding="utf-8"))
    result = {
        "suite": arguments.suite,
        "recipe": suite.recipe,
        "backbone": json.loads((first / "config.json").read_text(encoding="utf-8"))["backbone"],
        "flags": [*suite.flags, *further],
        "dataset": Path(facts["dataset"]).name,
        "split": "test",
        "splits": facts["splits"],
        "epochs": epochs,
        "seeds": arguments.seeds,
        "machine": facts["machine"],
        "rows": [row_of(name, suite.variants[name], runs) for name, runs in found.items()],
    }
    keep(result, arguments.output)
    print(table_of(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar100", help="a name on the Hub, or a folder")
    parser.add_argument("--output_dir", default="runs/ablation", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the table")
    parser.add_argument("--max_train_samples", type=int, help="the suite's otherwise")
    parser.add_argument("--epochs", type=int, help="the suite's otherwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    main(*parser.parse_known_args())
