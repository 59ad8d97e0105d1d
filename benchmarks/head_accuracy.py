"""What the default exit heads lose against the paper's: the quickstart's network and recipe with both, over several
seeds, accuracy of every exit on the test images.

    python benchmarks/head_accuracy.py --seeds 3 --threads 2 --output runs/head_accuracy.md

The splits are the quickstart's and stay the same; the seed draws the weights, the order and the augmentation.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import set_seed


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from quickstart import RECIPE, load_splits

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments
from hf_scan.costs import describe_machine
from hf_scan.data import eval_transform, train_transform
from hf_scan.model.image_processing_scan import create_image_processor


def accuracies(kind: str, seed: int, epochs: int) -> dict[str, float]:
    """Trains one network; its accuracies on the test images by name of the exit."""
    set_seed(seed)
    config = ScanConfig(backbone="cifar_resnet20", num_labels=10, attention_type=kind, classifier_type=kind)
    model = ScanForImageClassification(config).to(memory_format=torch.channels_last)
    processor = create_image_processor(model)
    splits = load_splits()
    with tempfile.TemporaryDirectory() as scratch:
        args = ScanTrainingArguments(
            **{**RECIPE, "num_train_epochs": epochs},
            output_dir=scratch,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        train = splits["train"].with_transform(train_transform(processor, crop="pad", flip=False))
        trainer = ScanTrainer(model, args, train_dataset=train, processing_class=processor)
        trainer.train()
        scores = trainer.evaluate(splits["test"].with_transform(eval_transform(processor)), metric_key_prefix="test")
    exits = [f"exit_{index}" for index in range(model.num_exits)]
    return {name: scores[f"test_{name}_accuracy"] for name in [*exits, "ensemble"]}


def main(output: Path, seeds: int, epochs: int) -> None:
    found: dict[str, list[dict[str, float]]] = {"conv": [], "separable": []}
    with tqdm(total=2 * seeds) as progress:
        for seed in range(seeds):
            for kind in found:
                found[kind].append(accuracies(kind, seed, epochs))
                progress.update()
    names = list(found["conv"][0])
    lines = ["| heads | seed | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    means = {}
    for kind, runs in found.items():
        for seed, run in enumerate(runs):
            lines.append(f"| {kind} | {seed} | " + " | ".join(f"{run[name]:.2%}" for name in names) + " |")
        means[kind] = {name: statistics.mean(run[name] for run in runs) for name in names}
        lines.append(f"| {kind} | mean | " + " | ".join(f"{means[kind][name]:.2%}" for name in names) + " |")
    differences = [100 * (means["separable"][name] - means["conv"][name]) for name in names]
    lines.append("| difference, points | | " + " | ".join(f"{value:+.2f}" for value in differences) + " |")
    header = (
        f"`cifar_resnet20` on scikit-learn's digits, {epochs} epochs, {len(load_splits()['test'])} test images. "
        f"{describe_machine()}."
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([header, "", *lines]) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/head_accuracy.md"), help="file for the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=RECIPE["num_train_epochs"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.output, arguments.seeds, arguments.epochs)
