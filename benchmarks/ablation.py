"""What each part of SCAN adds: the same network and recipe with one part left out at a time, over several seeds.

    python benchmarks/ablation.py --dataset_name uoft-cs/cifar100 --output_dir runs/ablation

Every run is one of `examples/train.py`, whose flags these are; those that a run folder has the figures of are not run
again, so that an interrupted benchmark goes on. By default, for a CPU: 15,000 train images and 10 epochs. On a GPU:
`--max_train_samples 45000 --epochs 200`. Accuracies are those of the test split, which chose nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[1]
# "alpha = 0" in the paper's words: the labels alone, with their full weight.
LABELS_ONLY = ["--label_weight", "1", "--soft_label_weight", "0"]
VARIANTS: dict[str, list[str]] = {
    "all": [],
    "without attention": ["--attention_type", "none"],
    "without distillation": LABELS_ONLY,
    "without hint": ["--hint_weight", "0"],
    "none of them": ["--attention_type", "none", *LABELS_ONLY, "--hint_weight", "0"],
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


def main(arguments: argparse.Namespace, further: list[str]) -> None:
    shared = [
        *(str(ROOT / "examples" / "recipes" / "cifar100_resnet20.yaml"), "--dataset_name", arguments.dataset_name),
        *("--max_train_samples", str(arguments.max_train_samples), "--num_train_epochs", str(arguments.epochs)),
        *("--distillation_preset", "paper", "--save_strategy", "no", "--disable_tqdm", "true", *further),
    ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tqdm(total=len(VARIANTS) * len(arguments.seeds)) as progress:
        for seed in arguments.seeds:
            for name, flags in VARIANTS.items():
                progress.set_description(f"{name}, seed {seed}")
                # A name for each setting, so that no figure is taken for another's.
                size = f"{arguments.max_train_samples}x{arguments.epochs}"
                folder = Path(arguments.output_dir, f"{name.replace(' ', '_')}_{size}_{seed}")
                found[name].append(accuracies(folder, [*shared, *flags, "--seed", str(seed)]))
                progress.update()
    exits = list(found["all"][0])
    lines = ["| | " + " | ".join(exits) + " |", "|---|" + "---:|" * len(exits)]
    for name, runs in found.items():
        columns = ([100 * run[exit_name] for run in runs] for exit_name in exits)
        several = len(runs) > 1
        cells = (f"{statistics.mean(c):.2f}" + f" ({min(c):.2f} to {max(c):.2f})" * several for c in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    size = f"{arguments.max_train_samples}x{arguments.epochs}"
    facts = json.loads(Path(arguments.output_dir, f"all_{size}_{arguments.seeds[0]}", "metrics.json").read_text())
    header = (
        f"`cifar_resnet20` on {facts['dataset']}: test accuracy in %, mean (and range) of seeds {arguments.seeds}; "
        f"images: {facts['splits']}; {arguments.epochs} epochs. {facts['machine']}."
    )
    table = "\n".join([header, "", *lines])
    Path(arguments.output_dir, "ablation.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar100", help="a name on the Hub, or a folder")
    parser.add_argument("--output_dir", default="runs/ablation", help="folder of the runs and the table")
    parser.add_argument("--max_train_samples", type=int, default=15_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    main(*parser.parse_known_args())
