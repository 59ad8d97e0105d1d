"""The main job from end to end, on images that come with scikit-learn: `make quickstart`.

Trains `cifar_resnet20` with early exits and the same network plain, with the same recipe and seed, on handwritten
digits; searches thresholds on images that training did not see; measures both networks on a third set; writes
`runs/quickstart`; loads that folder in a fresh process and shows what each image's exit was. With the extra
`hf_scan[onnx]` it also exports the network, and measures it in ONNX Runtime, in float32 and in INT8.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

import hf_scan
from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments, calibrate
from hf_scan.costs import describe_machine, measure_costs, realised_speedup
from hf_scan.data import eval_transform, split_off, train_transform
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.reporting.model_card import create_model_card
from hf_scan.reporting.plotting import describe_answers, plot_answers, plot_attention
from hf_scan.reporting.report import exit_report, exit_table, speedup_lines
from hf_scan.training.baseline import plain_accuracy, plain_copy
from hf_scan.training.output_dirs import check_replaceable, replaced_folder


SEED = 0
RECIPE: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "recipes" / "digits.yaml").read_text())


def load_splits() -> DatasetDict:
    """1,797 scans of handwritten digits, 8x8 pixels: 30 % to test, 14 % to search thresholds on, the rest to train."""
    digits = load_digits()
    images = [PILImage.fromarray((pixels * 255 / 16).astype(np.uint8)) for pixels in digits.images]
    features = Features({"image": Image(), "labels": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = Dataset.from_dict({"image": images, "labels": digits.target}, features=features)
    rest, test = split_off(rows, 0.3, seed=SEED)
    train, search = split_off(rest, 0.2, seed=SEED)
    return DatasetDict(train=train, search=search, test=test)


def main(output_dir: Path, epochs: int) -> None:
    check_replaceable(output_dir)
    splits = load_splits()
    set_seed(SEED)
    names = splits["train"].features["labels"].names
    config = ScanConfig(
        backbone="cifar_resnet20", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    model = ScanForImageClassification(config).to(memory_format=torch.channels_last)
    plain = plain_copy(model).to(memory_format=torch.channels_last)
    processor = create_image_processor(model)
    # A mirrored digit is another one, or none.
    augment = train_transform(processor, crop="pad", flip=False)
    train = splits["train"].with_transform(augment)
    search, test = (splits[name].with_transform(eval_transform(processor)) for name in ("search", "test"))

    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            **RECIPE,
            "num_train_epochs": epochs,
            "output_dir": scratch,
            "seed": SEED,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_strategy": "epoch",
            "use_cpu": not torch.cuda.is_available(),
        }
        print(f"Training {config.backbone} with {model.num_exits} exits on {len(train)} images", flush=True)
        trainer = ScanTrainer(
            model, ScanTrainingArguments(**settings), train_dataset=train, processing_class=processor
        )
        trainer.train()
        print("Training the same network plain, with the same recipe and seed", flush=True)
        plain_trainer = Trainer(
            plain,
            TrainingArguments(**settings, remove_unused_columns=False),
            train_dataset=train,
            compute_metrics=plain_accuracy,
        )
        plain_trainer.train()

        print(f"Searching thresholds on {len(search)} images that training did not see", flush=True)
        model.eval()
        plain.eval()
        model.exit_config = calibrate(model, search, seed=SEED)
        scores = trainer.evaluate(test, metric_key_prefix="test")
        plain_scores = plain_trainer.evaluate(test, metric_key_prefix="test")

    print("Measuring what each exit costs, and both networks in turns", flush=True)
    model.exit_config = model.exit_config.replace(costs=measure_costs(model, batch_size=64))
    images = torch.stack([row["pixel_values"] for row in test]).to(model.device, memory_format=torch.channels_last)
    speedups = [
        realised_speedup(model, images[:100], batch_size=1, plain=plain.timm_model),
        realised_speedup(model, images, batch_size=64, plain=plain.timm_model),
        realised_speedup(model, images, batch_size=64, plain=plain.timm_model, refilled=True),
    ]
    report = exit_report(
        model,
        {name.removeprefix("test_"): score for name, score in scores.items()},
        speedups,
        plain_accuracy=plain_scores["test_accuracy"],
    )
    deployed = measure_onnx_runtime(model, search, images, torch.tensor(list(splits["test"]["labels"])))
    facts = {
        "dataset": "scikit-learn digits",
        "splits": {name: len(rows) for name, rows in splits.items()},
        "seed": SEED,
        "machine": f"{describe_machine(model.device)}, both networks in channels_last",
        "recipe": {**RECIPE, "num_train_epochs": epochs},
    }
    with replaced_folder(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "metrics.json").write_text(
            json.dumps({**facts, **report, "onnx_runtime": deployed}, indent=2) + "\n", encoding="utf-8"
        )
        create_model_card(model, report, facts, model_name=str(output_dir)).save(folder / "README.md")

    print(f"\n{len(test)} test images of {facts['dataset']}, seed {SEED}; {facts['machine']}")
    print(exit_table(report))
    print("\n".join(speedup_lines(report)))
    for row in deployed:
        print(
            f"speed-up in ONNX Runtime, {row['precision']}, batch {row['batch_size']}: {row['speedup']:.2f}x over the "
            f"plain network there ({row['adaptive_ms']:.3f} / {row['plain_ms']:.3f} ms an image), "
            f"{row['accuracy']:.2%} right"
        )
    print(f"\nWritten to {output_dir}. Loading it in a fresh process:", flush=True)
    subprocess.run([sys.executable, __file__, "--show", "--output_dir", str(output_dir)], check=True)


def measure_onnx_runtime(
    model: ScanForImageClassification, search: Dataset, images: torch.Tensor, labels: torch.Tensor
) -> list[dict[str, Any]]:
    """Export the network and measure it against the plain one in the same runtime and precision."""
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        print("ONNX Runtime is not measured; `pip install 'hf_scan[onnx]'` adds it")
        return []
    import onnxruntime

    from hf_scan.runtime import ORTScanForImageClassification

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    images = images.cpu().contiguous()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.export_onnx(folder, calibration_dataset=search)
        for precision, subfolder in {"float32": "", "INT8": "int8"}.items():
            engine: Any = ORTScanForImageClassification.from_pretrained(
                folder, subfolder=subfolder, session_options=options
            )
            if engine.exit_config.thresholds is None:  # INT8 has scores of its own
                engine.exit_config = calibrate(engine, search, seed=SEED)
            right = engine.predict_adaptive(images).logits.argmax(-1) == labels
            for batch_size, chosen in {1: images[:100], 64: images}.items():
                found = realised_speedup(engine, chosen, batch_size=batch_size)
                rows.append(
                    {
                        "precision": precision,
                        "batch_size": batch_size,
                        "plain_ms": found.plain,
                        "adaptive_ms": found.adaptive,
                        "speedup": found.speedup,
                        "accuracy": float(right.float().mean()),
                    }
                )
    return rows


def show(folder: Path) -> None:
    """Loads a checkpoint as anyone would, and shows test images with the exit that each took."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    images = list(load_splits()["test"]["image"])
    answers = model.predict_adaptive(processor(images, return_tensors="pt")["pixel_values"])
    chosen: list[int] = []
    for index in answers.exit_index.unique():
        chosen += (answers.exit_index == index).nonzero()[:4, 0].tolist()  # the first four that left there
    picked = type(answers)(**{name: values[chosen] for name, values in answers.items()})
    pictures = [images[i] for i in chosen]
    texts = describe_answers(picked, model)
    for start in range(0, len(chosen), 4):
        row = list(zip(pictures, texts))[start : start + 4]
        columns = [[*drawing(picture), *text.splitlines()] for picture, text in row]
        print("\n".join("  ".join(cell.ljust(18) for cell in line).rstrip() for line in zip(*columns)), "\n")
    plot_answers(pictures, picked, model, folder / "exits.png")
    plot_attention(model, processor(pictures[-6:], return_tensors="pt")["pixel_values"], folder / "attention.png")
    print(f"hf_scan {hf_scan.__version__}: the same as a picture in {folder / 'exits.png'}")
    print(f"What the exits look at is in {folder / 'attention.png'}")


def drawing(image: PILImage.Image) -> list[str]:
    """A small grey image in letters."""
    shades = " .:-=+*#%@"
    return ["".join(2 * shades[int(pixel) * len(shades) // 256] for pixel in row) for row in np.asarray(image)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="folder to replace")
    parser.add_argument("--epochs", type=int, default=RECIPE["num_train_epochs"], help="passes over the train images")
    parser.add_argument("--show", action="store_true", help="only load the folder and show its answers")
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.output_dir)
    else:
        main(arguments.output_dir, arguments.epochs)
