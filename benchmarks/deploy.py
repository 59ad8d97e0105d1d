"""Adaptive inference where classifiers are deployed: ONNX Runtime in float32 and INT8, beside compiled PyTorch.

    python benchmarks/deploy.py --model runs/quickstart
    python benchmarks/deploy.py --model runs/cifar100 --plain runs/cifar100_plain --dataset_name uoft-cs/cifar100 \
        --image_column img --label_column fine_label --overhead resnet50

The network is exported with images of its search split to calibrate INT8. Thresholds are found for each precision on
its own logits of the search split, so that no accuracy is lost there against its own plain network; accuracies are
those of the test split. Times are process CPU time of one thread by default, which other programs on the machine
disturb less than the wall clock, or wall time with `--clock wall`; each contender in turns, medians over rounds.
`--overhead` adds networks with random weights, for the time when no image leaves. The JSON file is written after every
setting.
"""

# ruff: noqa: E402 (the environment is set before anything else is imported)

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


# As in adaptive.py: both make the plain network faster, too.
TUNING = {
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "TORCHINDUCTOR_FREEZING": "1",
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in TUNING.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNING})

import numpy as np
import onnxruntime
import torch
from adaptive import NOTHING_LEAVES, load_splits
from torch.utils.data import DataLoader
from transformers import TimmWrapperForImageClassification, default_data_collator

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, apply_exit_rule, calibrate, measure_costs
from hf_scan.calibration import collect_exit_logits
from hf_scan.costs import describe_machine
from hf_scan.runtime import ORTScanForImageClassification


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
PRECISIONS = {"float32": "", "int8": "int8"}


@dataclass
class Contender:
    """
    Something that answers images.

    Args:
        name (`str`): What it is called.
        call (`Callable`): Takes a batch.
        accuracy (`float`, *optional*): On the test split; None for random weights.
        milliseconds (`dict[str, float]`): For one image, by batch size.
        spread (`dict[str, list[float]]`): The least and the most of the rounds.
    """

    name: str
    call: Callable[[Any], Any] = field(repr=False)
    accuracy: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, list[float]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the JSON file says of it."""
        return {name: getattr(self, name) for name in ("name", "accuracy", "milliseconds", "spread")}


class Results:
    """The JSON file, written anew whenever something is known."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.networks: list[dict[str, Any]] = []
        if path.is_file():  # of other networks on this machine
            known = json.loads(path.read_text(encoding="utf-8"))
            self.networks = known["networks"] if known["facts"]["machine"] == facts["machine"] else []

    def save(self, network: dict[str, Any], contenders: list[Contender]) -> None:
        """Write what is known of a network by now."""
        network = {
            **network,
            "contenders": [contender.facts() for contender in contenders],
            "ratios": list(ratios(contenders)),
        }
        others = [known for known in self.networks if known["network"] != network["network"]]
        self.networks = [*others, network]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        text = json.dumps({"facts": self.facts, "networks": self.networks}, indent=2)
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(self.path)


def measure(contenders: list[Contender], images: np.ndarray, batch_size: int, rounds: int, clock: str) -> None:
    """Fill in everyone's times at a batch size, all in turns."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            start = CLOCKS[clock]()
            for batch in batches:
                contender.call(batch)
            if number > 0:  # the first warms up
                seconds[contender.name].append(1000 * (CLOCKS[clock]() - start) / len(images))
    for contender in contenders:
        values = seconds[contender.name]
        contender.milliseconds[str(batch_size)] = statistics.median(values)
        contender.spread[str(batch_size)] = [min(values), max(values)]


def ratios(contenders: list[Contender]) -> Iterator[dict[str, Any]]:
    """Yield what the times mean, by batch size."""
    known = {contender.name: contender.milliseconds for contender in contenders}
    pairs = [
        (f"{what} / {other}", what, other)
        for precision in PRECISIONS
        for what, other in (
            (f"ORT {precision}, nothing leaves", f"ORT {precision}, plain"),
            (f"ORT {precision}, plain", f"ORT {precision}, adaptive"),
        )
    ]
    pairs += [
        (
            f"PyTorch compiled, {form} / ORT {precision}, {form}",
            f"PyTorch compiled, {form}",
            f"ORT {precision}, {form}",
        )
        for precision in PRECISIONS
        for form in ("plain", "adaptive")
    ]
    for name, over, under in pairs:
        for batch_size in known.get(over, {}):
            if batch_size in known.get(under, {}):
                value = known[over][batch_size] / known[under][batch_size]
                yield {"what": name, "batch_size": int(batch_size), "value": value}


def session_options(threads: int) -> Any:
    """Of all sessions: so many threads, which do not spin while they wait."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def ort_contenders(
    folder: Path, splits: dict[str, Any] | None, options: Any, batch_size: int
) -> Iterator[tuple[list[Contender], dict[str, Any]]]:
    """
    Yield the contenders of each precision of an export, and the facts on it.

    Args:
        folder (`Path`): The export.
        splits (`dict`, *optional*): Rows to search and to test on; without them only the overhead is of interest.
        options (`onnxruntime.SessionOptions`): Of all sessions.
        batch_size (`int`): Up to which costs are measured.
    """
    for precision, subfolder in PRECISIONS.items():
        if not (folder / subfolder / "onnx").is_dir():
            continue
        engine = ORTScanForImageClassification.from_pretrained(folder, subfolder=subfolder, session_options=options)
        nothing = ExitConfig(thresholds=[NOTHING_LEAVES] * engine.num_exits, fallback="deepest")
        found = [
            Contender(f"ORT {precision}, plain", engine.plain),
            Contender(
                f"ORT {precision}, nothing leaves", deployed(engine, nothing, options, folder.parent).predict_adaptive
            ),
        ]
        facts: dict[str, Any] = {"megabytes": bytes_of(folder / subfolder / "onnx") / 1e6}
        if splits is not None:
            tables = {name: collect_exit_logits(engine, rows, name) for name, rows in splits.items()}
            logits = {name: torch.from_numpy(table.logits).unbind(dim=1) for name, table in tables.items()}
            labels = {name: torch.from_numpy(table.labels) for name, table in tables.items()}
            right = {name: accuracy(logits[name][-1], labels[name]) for name in tables}
            found[0].accuracy = found[1].accuracy = right["test"]
            engine.exit_config = engine.exit_config.replace(costs=measure_costs(engine, batch_size, threads=1))
            points = operating_points(engine, tables["search"], right["search"])
            facts |= {"least accuracy on the search split": right["search"], "operating point": {}}
            if points:
                point = min(points, key=lambda one: one.search["cost"])
                answers = apply_exit_rule(logits["test"], point)
                share = torch.bincount(answers.exit_index, minlength=engine.num_exits + 1) / len(labels["test"])
                facts["operating point"] = {**point.rule, "shares on the test split": share.tolist()}
                call = deployed(engine, point, options, folder.parent).predict_adaptive
                found.append(Contender(f"ORT {precision}, adaptive", call, accuracy(answers.logits, labels["test"])))
        yield found, {precision: facts}


def deployed(engine: Any, point: ExitConfig, options: Any, scratch: Path) -> Any:
    """Return an engine saved with a policy and loaded again, so that `adaptive.onnx` has its rule."""
    kept, engine.exit_config = engine.exit_config, point
    folder = tempfile.mkdtemp(dir=scratch)
    engine.save_pretrained(folder)
    engine.exit_config = kept
    return ORTScanForImageClassification.from_pretrained(folder, session_options=options)


def operating_points(engine: Any, table: Any, least: float) -> list[ExitConfig]:
    """Return the cheapest policies by fallback that reach an accuracy on the search split."""
    points = []
    for fallback in ("ensemble", "deepest"):
        try:
            points.append(calibrate(engine, table, min_accuracy=least, fallback=fallback))
        except ValueError as error:  # nothing reaches it
            print(error)
    return points


def pytorch_contenders(model: Any, ort: list[Contender], rule: dict[str, Any] | None) -> Iterator[Contender]:
    """Yield the compiled networks, plain and with the thresholds of ONNX Runtime in float32, which has its logits."""
    known = {contender.name: contender.accuracy for contender in ort}

    def answer(call: Callable[..., Any], batch: np.ndarray) -> Any:
        with torch.inference_mode():
            return call(torch.from_numpy(batch).to(memory_format=torch.channels_last))

    plain = torch.compile(copy.deepcopy(model.backbone))
    yield Contender("PyTorch compiled, plain", partial(answer, plain), known["ORT float32, plain"])
    if rule is not None:
        fast = copy.deepcopy(model)
        fast.compile_stages()
        call = partial(fast.predict_adaptive, exit_config=ExitConfig(**rule))
        yield Contender("PyTorch compiled, adaptive", partial(answer, call), known["ORT float32, adaptive"])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of the rows whose largest logit is the label's."""
    return float((logits.argmax(-1) == labels).float().mean())


def accuracy_of(folder: Path, rows: Any) -> float:
    """Return the accuracy of a plain network that `examples/train.py --plain` wrote."""
    network = TimmWrapperForImageClassification.from_pretrained(folder).timm_model.eval()
    right = []
    with torch.inference_mode():
        for batch in DataLoader(rows, batch_size=64, collate_fn=default_data_collator):
            right.append(network(batch["pixel_values"]).argmax(-1) == batch["labels"])
    return float(torch.cat(right).float().mean())


def bytes_of(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def trained_network(arguments: argparse.Namespace, results: Results) -> None:
    """Measure a trained network on its own dataset."""
    model = ScanForImageClassification.from_pretrained(arguments.model).eval()
    splits, dataset, seed = load_splits(arguments)
    if arguments.images is not None:
        splits = {name: rows.select(range(min(arguments.images, len(rows)))) for name, rows in splits.items()}
    network: dict[str, Any] = {
        "network": arguments.model.name,
        "backbone": model.config.backbone,
        "dataset": dataset,
        "seed": seed,
        "splits": {name: len(rows) for name, rows in splits.items()},
        "megabytes of float32 weights": (arguments.model / "model.safetensors").stat().st_size / 1e6,
    }
    if arguments.plain is not None:
        network["accuracy of the plain network, trained as such"] = {
            name: accuracy_of(arguments.plain, rows) for name, rows in splits.items()
        }
    rows = splits["test"]
    images = np.stack([np.asarray(rows[index]["pixel_values"]) for index in range(min(len(rows), 256))])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "exported")
        model.export_onnx(folder, calibration_dataset=splits["search"])
        contenders: list[Contender] = []
        options = session_options(arguments.threads)
        for found, facts in ort_contenders(folder, splits, options, max(arguments.batch_sizes)):
            contenders += found
            network |= facts
            results.save(network, contenders)
        if arguments.compile:
            point = network["float32"]["operating point"]
            rule = {name: value for name, value in point.items() if not name.startswith("shares")} or None
            contenders += pytorch_contenders(model.to(memory_format=torch.channels_last), contenders, rule)
        run(network, contenders, images, arguments, results)


def random_network(backbone: str, arguments: argparse.Namespace, results: Results) -> None:
    """Measure what a network with random weights takes when no image leaves."""
    model = ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=100)).eval()
    size = model.config.image_size
    assert size is not None
    network = {"network": f"{backbone}, random weights", "backbone": backbone, "pixels": size}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "exported")
        images = torch.rand(64, 3, size, size)
        model.export_onnx(folder, calibration_dataset=images[:32] if arguments.int8_overhead else None)
        contenders: list[Contender] = []
        for found, facts in ort_contenders(folder, None, session_options(arguments.threads), 1):
            contenders += found
            network |= facts
        run(network, contenders, images.numpy(), arguments, results)


def run(
    network: dict[str, Any],
    contenders: list[Contender],
    images: np.ndarray,
    arguments: argparse.Namespace,
    results: Results,
) -> None:
    """Measure all batch sizes, and write each when it is there."""
    network["load average"] = {}
    for batch_size in arguments.batch_sizes:
        torch.compiler.reset()  # compiled code is at best for a batch size
        # Large images take long enough by themselves.
        count = 24 + batch_size if images[0].size < 50_000 else max(4, batch_size)
        chosen = images[: max(1, min(count, len(images)) // batch_size) * batch_size]
        measure(contenders, chosen, batch_size, arguments.rounds, arguments.clock)
        network["load average"][str(batch_size)] = os.getloadavg()[0]
        results.save(network, contenders)
        for contender in contenders:
            low, high = contender.spread[str(batch_size)]
            time_ = contender.milliseconds[str(batch_size)]
            print(f"{network['network']}, batch {batch_size}: {contender.name} {time_:.3f} [{low:.3f}, {high:.3f}] ms")
    for ratio in ratios(contenders):
        print(f"{network['network']}, batch {ratio['batch_size']}: {ratio['what']} = {ratio['value']:.3f}", flush=True)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    facts = {
        "machine": describe_machine(),
        "onnxruntime": onnxruntime.__version__,
        "threads": arguments.threads,
        "clock": f"{arguments.clock} time of the process, in turns, medians of {arguments.rounds} rounds",
        "environment": TUNING,
    }
    results = Results(arguments.output, facts)
    if arguments.model is not None:
        trained_network(arguments, results)
    for backbone in arguments.overhead:
        random_network(backbone, arguments, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained network")
    parser.add_argument("--plain", type=Path, help="folder of the plain network, for its accuracy")
    parser.add_argument("--dataset_name", help="what the model was trained on; the quickstart's digits otherwise")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--images", type=int, help="use the first so many of each split; all by default")
    parser.add_argument("--overhead", nargs="*", default=[], help="backbones to measure when nothing leaves")
    parser.add_argument("--int8_overhead", action="store_true", help="of these, INT8 too")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu", help="CPU time suits one thread only")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave PyTorch out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/deploy.json"), help="file to write")
    main(parser.parse_args())
