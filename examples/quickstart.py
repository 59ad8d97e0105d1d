"""The main job from end to end, on images that come with scikit-learn: `make quickstart`.

Trains `cifar_resnet20` with early exits and the same network plain, with the same recipe and seed, on handwritten
digits; searches thresholds on images that training did not see; measures both networks on a third set; writes
`runs/quickstart`; loads that folder in a fresh process and shows what each image's exit was. With the extra
`hf_scan[onnx]` it also exports the network, and measures it in ONNX Runtime, in float32 and in INT8.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any


# Before PyTorch is imported: no notice of a CUDA that is there without a GPU.
os.environ.setdefault("TORCH_LOGS", "-torch.utils.cpp_extension")

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments, calibrate
from hf_scan.calibration import collect_exit_logits
from hf_scan.costs import CostModel, describe_machine, measure_costs, realised_speedup
from hf_scan.data import eval_transform, split_off, train_transform
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.reporting.model_card import create_model_card
from hf_scan.reporting.plotting import describe_answers, plot_answers, plot_attention
from hf_scan.reporting.report import exit_report, exit_table, markdown_table, shares_line
from hf_scan.reporting.saved_frontier import SavedFrontier
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


class OneLine(TrainerCallback):
    """A bar of one line for a whole training, in place of Transformers' lines for each epoch."""

    def __init__(self, text: str, epochs: int) -> None:
        self.bar = tqdm(total=epochs, desc=text, bar_format="{desc}: {bar:30} {n:.0f}/{total:.0f} epochs{postfix}")

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.2f}", refresh=False)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


def train_in_one_line(trainer: Trainer, text: str) -> None:
    """Train, and show nothing but one bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(OneLine(text, int(trainer.args.num_train_epochs)))
    trainer.train()


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
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        print(
            f"{config.backbone} with {model.num_exits} exits, on {len(train)} images of handwritten digits", flush=True
        )
        trainer = ScanTrainer(
            model, ScanTrainingArguments(**settings), train_dataset=train, processing_class=processor
        )
        train_in_one_line(trainer, "1 of 5: training with exits      ")
        plain_trainer = Trainer(
            plain,
            TrainingArguments(**settings, remove_unused_columns=False),
            train_dataset=train,
            compute_metrics=plain_accuracy,
        )
        train_in_one_line(plain_trainer, "2 of 5: the same network, plain ")

        print(f"3 of 5: searching thresholds on {len(search)} images that training did not see", flush=True)
        model.eval()
        plain.eval()
        table = collect_exit_logits(model, search)
        model.exit_config = calibrate(model, table, seed=SEED)
        frontier = SavedFrontier.of(table, model.exit_config, CostModel.of(model))
        trainer.remove_callback(PrinterCallback)
        scores = trainer.evaluate(test, metric_key_prefix="test")
        plain_scores = plain_trainer.evaluate(test, metric_key_prefix="test")

    print("4 of 5: measuring what each exit costs, and both networks in turns", flush=True)
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
    facts = {
        "dataset": "scikit-learn digits",
        "splits": {name: len(rows) for name, rows in splits.items()},
        "seed": SEED,
        "machine": f"{describe_machine(model.device)}, both networks in channels_last",
        "recipe": {**RECIPE, "num_train_epochs": epochs},
    }
    with replaced_folder(output_dir) as folder:
        deployed = measure_onnx_runtime(model, search, images, torch.tensor(list(splits["test"]["labels"])), folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        frontier.save(folder)
        with torch.inference_mode():
            save_samples(splits["test"], model.predict_adaptive(images).exit_index.tolist(), folder / "samples")
        (folder / "metrics.json").write_text(
            json.dumps({**facts, **report, "onnx_runtime": deployed}, indent=2) + "\n", encoding="utf-8"
        )
        create_model_card(model, report, facts, model_name=str(output_dir)).save(folder / "README.md")

    print(f"5 of 5: loading {output_dir} in a fresh process\n", flush=True)
    subprocess.run([sys.executable, __file__, "--show", "--output_dir", str(output_dir)], check=True)
    print_results(report, deployed, facts, output_dir)


def save_samples(test: Dataset, exits: list[int], folder: Path) -> None:
    """Write test images as files, for `hf-scan demo`: the first 16, and the first of the few that leave later."""
    folder.mkdir()
    late = [index for index, place in enumerate(exits) if place > 0 and index >= 16]
    for number, index in enumerate([*range(16), *late[:8]]):
        test[index]["image"].save(folder / f"{number:02d}_a_{test[index]['labels']}.png")


def print_results(report: dict[str, Any], deployed: list[dict[str, Any]], facts: dict[str, Any], folder: Path) -> None:
    """Print what came out: accuracy, where images leave and how much faster that is; then what to do next."""
    print(f"Results on {facts['splits']['test']} test images, which chose nothing; seed {SEED}, {facts['machine']}\n")
    print(exit_table(report))
    print(f"\n{shares_line(report)}\n")
    sizes = {"batch 1": 1, "batch 64": 64, "batch 64, refilled": 0}
    rows = [["speed-up over the plain network", *sizes]]
    rows.append(["PyTorch", *(f"{report['speedup'][f'realised, {name}']:.2f}x" for name in sizes)])
    for precision in dict.fromkeys(row["precision"] for row in deployed):
        found = {row["batch_size"]: f"{row['speedup']:.2f}x" for row in deployed if row["precision"] == precision}
        rows.append([f"ONNX Runtime, {precision}", *(found.get(size, "") for size in sizes.values())])
    print(markdown_table(rows))
    beside = Path(sys.executable).with_name("hf-scan")
    # After `make quickstart`, the environment is not activated.
    command = "hf-scan" if shutil.which("hf-scan") or not beside.is_file() else os.path.relpath(beside)
    print(f"\nWritten to {folder}. Next:\n  {command} predict {folder} {folder / 'samples' / '*.png'}")
    print(f"  {command} demo --model {folder}   (the same in the browser; needs `pip install -e '.[demo]'`)")


def measure_onnx_runtime(
    model: ScanForImageClassification, search: Dataset, images: torch.Tensor, labels: torch.Tensor, kept: Path
) -> list[dict[str, Any]]:
    """
    Export the network and measure it against the plain one in the same runtime and precision. The export in INT8 is
    kept in the folder `int8` of `kept`, for `hf-scan demo`.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        print("ONNX Runtime is not measured; `pip install 'hf_scan[onnx]'` adds it")
        return []
    from hf_scan.runtime import ORTScanForImageClassification, threaded_options

    options = threaded_options(torch.get_num_threads())
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
                shutil.copytree(Path(folder, subfolder), kept / subfolder)
                engine.exit_config.save_pretrained(kept / subfolder)
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
    """Loads a checkpoint as anyone would, and shows a test image for each exit."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    images = list(load_splits()["test"]["image"])
    answers = model.predict_adaptive(processor(images, return_tensors="pt")["pixel_values"])
    chosen: list[int] = []
    for index in answers.exit_index.unique():
        chosen += (answers.exit_index == index).nonzero()[:4, 0].tolist()  # the first four that left there
    picked = type(answers)(**{name: values[chosen] for name, values in answers.items()})
    pictures = [images[i] for i in chosen]
    first = [chosen.index(i) for i in {int(answers.exit_index[i]): i for i in reversed(chosen)}.values()]
    texts = describe_answers(picked, model)
    columns = [[*drawing(pictures[i]), *texts[i].splitlines()] for i in sorted(first)]
    print("\n".join("  ".join(cell.ljust(18) for cell in line).rstrip() for line in zip(*columns)))
    plot_answers(pictures, picked, model, folder / "exits.png")
    plot_attention(model, processor(pictures[-6:], return_tensors="pt")["pixel_values"], folder / "attention.png")
    print(f"\nMore of them are in {folder / 'exits.png'}, and what the exits look at in {folder / 'attention.png'}\n")


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
    # What is shown is what is said here, and no bars and warnings of the libraries that it is built on.
    warnings.filterwarnings("ignore", module=r"(?!hf_scan)")
    disable_progress_bar()
    if arguments.show:
        show(arguments.output_dir)
    else:
        main(arguments.output_dir, arguments.epochs)
