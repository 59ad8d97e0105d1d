"""What training costs: a step with exits over a plain step of the same backbone, and how much of a run is computing.

    python benchmarks/training.py --threads 2 --output runs/training.md

A step is forward, loss, backward and SGD on a batch of 128 random images of 32x32 pixels, in channels_last, as the
trainers make it; medians of seven interleaved rounds. The second figure is for images in memory, augmented by the
batch: time of the steps over time of a whole run, which reads, augments and moves them besides.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tqdm import tqdm
from transformers import Trainer

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments
from hf_scan.costs import describe_machine, interleaved_medians
from hf_scan.data import ImagesInMemory, SeededImages
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.training.baseline import plain_copy


BATCH_SIZE = 128


def trainer_of(kind: str, backbone: str, folder: str, train_dataset: Any = None, **settings: Any) -> Trainer:
    """A trainer for the plain backbone, or for one with exits of a kind."""
    heads = "separable" if kind == "plain" else kind
    config = ScanConfig(backbone=backbone, num_labels=100, attention_type=heads, classifier_type=heads)
    model = ScanForImageClassification(config)
    network = (plain_copy(model) if kind == "plain" else model).to(memory_format=torch.channels_last)
    args = ScanTrainingArguments(
        folder,
        per_device_train_batch_size=BATCH_SIZE,
        optim="sgd",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )
    trainer = (Trainer if kind == "plain" else ScanTrainer)(network, args, train_dataset=train_dataset)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as inside of `train`
    network.to(args.device).train()
    return trainer


def step_of(trainer: Trainer) -> Callable[[], None]:
    """One step on images that are there already."""
    device = trainer.args.device
    batch = {
        "pixel_values": torch.randn(BATCH_SIZE, 3, 32, 32, device=device),
        "labels": torch.randint(100, (BATCH_SIZE,), device=device),
    }

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def share_of_computing(backbone: str, folder: str, seconds_a_step: float, steps: int) -> float:
    """Time of the steps over time of a whole run."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (4 * BATCH_SIZE, 32, 32, 3), dtype=np.uint8)
    rows = Dataset.from_dict(
        {"image": [PILImage.fromarray(image) for image in pixels], "labels": list(rng.integers(0, 100, len(pixels)))},
        features=Features({"image": Image(), "labels": ClassLabel(num_classes=100)}),
    )
    processor = create_image_processor(ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=100)))
    on_gpu = torch.cuda.is_available()
    images = SeededImages(ImagesInMemory(rows, processor, device="cuda" if on_gpu else "cpu"), seed=0)
    trainer = trainer_of(
        "separable", backbone, folder, images, max_steps=steps, dataloader_pin_memory=False, report_to=[]
    )
    return seconds_a_step * steps / trainer.train().metrics["train_runtime"]


def main(output: Path, backbones: list[str], steps: int) -> None:
    lines = ["| backbone | plain step, ms | default heads | conv heads | computing |", "|---|---:|---:|---:|---:|"]
    for backbone in tqdm(backbones):
        with tempfile.TemporaryDirectory() as folder:
            trainers = {kind: trainer_of(kind, backbone, folder) for kind in ("plain", "separable", "conv")}
            seconds = interleaved_medians({kind: step_of(trainer) for kind, trainer in trainers.items()})
            share = share_of_computing(backbone, folder, seconds["separable"], steps)
        ratios = (seconds[kind] / seconds["plain"] for kind in ("separable", "conv"))
        cells = [f"{1000 * seconds['plain']:.0f}", *(f"{ratio:.2f}x" for ratio in ratios), f"{share:.0%}"]
        lines.append(f"| `{backbone}` | " + " | ".join(cells) + " |")
    table = "\n".join(
        [f"{describe_machine('cuda' if torch.cuda.is_available() else 'cpu')}. Batches of {BATCH_SIZE}.", "", *lines]
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/training.md"), help="file to write the table to")
    parser.add_argument("--backbones", nargs="+", default=["cifar_resnet20", "cifar_resnet18", "cifar_resnet50"])
    parser.add_argument("--steps", type=int, default=20, help="length of the whole run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.output, arguments.backbones, arguments.steps)
