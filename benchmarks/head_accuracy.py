"""What cheaper exit heads lose against the paper's: the quickstart's network and recipe with each, over several seeds,
accuracy of every exit on the test images.

    python benchmarks/head_accuracy.py --seeds 3 --threads 2
    python benchmarks/head_accuracy.py --forms separable nearest --seeds 3

The splits are the quickstart's and stay the same; the seed draws the weights, the order and the augmentation.
"""

import argparse
import json
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


RESULTS = Path("benchmarks/results/head_accuracy.json")
# Attention and classifier. The first that is compared is what the others are compared with.
FORMS = {"conv": ("conv", "conv"), "separable": ("separable", "separable"), "nearest": ("nearest", "separable")}


def accuracies(form: str, seed: int, epochs: int) -> dict[str, float]:
    """Train one network, and return its accuracies on the test images by name of the exit."""
    set_seed(seed)
    attention, classifier = FORMS[form]
    config = ScanConfig(backbone="cifar_resnet20", num_labels=10, attention_type=attention, classifier_type=classifier)
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


def main(output: Path, forms: list[str], seeds: int, epochs: int) -> None:
    found: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    with tqdm(total=len(forms) * seeds) as progress:
        for seed in range(seeds):
            for form in forms:
                found[form].append(accuracies(form, seed, epochs))
                progress.update()
    names = list(found[forms[0]][0])
    means = {
        form: {name: statistics.mean(run[name] for run in runs) for name in names} for form, runs in found.items()
    }
    result = {
        "network": "cifar_resnet20",
        "dataset": "scikit-learn digits",
        "split": "test",
        "n": len(load_splits()["test"]),
        "seeds": list(range(seeds)),
        "epochs": epochs,
        "machine": describe_machine(),
        "accuracies": found,
        "means": means,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| heads | seed | " + " | ".join(names) + " |\n|---|---|" + "---:|" * len(names))
    for form, runs in found.items():
        for seed, run in [*enumerate(runs), ("mean", means[form])]:
            print(f"| {form} | {seed} | " + " | ".join(f"{run[name]:.2%}" for name in names) + " |")
    for form in forms[1:]:
        differences = (f"{100 * (means[form][name] - means[forms[0]][name]):+.2f}" for name in names)
        print(f"| {form} against {forms[0]}, points | mean | " + " | ".join(differences) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the figures")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=RECIPE["num_train_epochs"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.output, arguments.forms, arguments.seeds, arguments.epochs)
