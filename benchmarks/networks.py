"""Networks with early exits against their plain twins: accuracy, and speed-up on the clock, for the README.

    python benchmarks/networks.py --model runs/photos --plain runs/photos_plain --dataset_name photos --holdout 0.2
    python benchmarks/networks.py --model runs/quickstart

`--model` is a folder that `examples/train.py` or `hf-scan equip` wrote; `--plain` one that `examples/train.py --plain`
wrote by the same recipe: the network as it is without early exits, trained alone. Without `--plain`, the twin is the
model's own deepest exit, which is right where its backbone was frozen, or never trained alone.

For each runtime and batch size, thresholds are found on the search split, by costs measured there, so that at most
`--drop` points are lost against the twin's accuracy on that split. Accuracies are those of the whole test split, in
float32; INT8's are its own. Times are of the first test images, plain and adaptive in turns, medians over rounds:
process CPU time for one thread, as in deploy.py. The twin has the backbone's graph, so its time is that of the
exported backbone. Rows of the same network, runtime, batch size, threads and drop are replaced.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tuned import restart_tuned


if __name__ == "__main__":
    restart_tuned()

import numpy as np
import torch
from adaptive import load_splits
from deploy import OPENVINO, ORT, PRECISIONS, PYTORCH, answers_by, deployed, kept_table, load_engine, margin_of
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TimmWrapperForImageClassification, default_data_collator

from hf_scan import ExitConfig, ScanForImageClassification, calibrate, measure_costs
from hf_scan.costs import describe_machine


RESULTS = Path("benchmarks/results/networks.json")
# What makes two rows the same row, measured again.
SAME = ("network", "dataset", "runtime", "batch_size", "threads", "max_accuracy_drop")


def plain_right(folder: Path, splits: dict[str, Any], scratch: Path) -> dict[str, float]:
    """Return the twin's accuracy on each split, read from a file if it has been tested before."""
    path = scratch / "plain.json"
    if not path.is_file():
        network = TimmWrapperForImageClassification.from_pretrained(folder).timm_model.eval()
        network.to(memory_format=torch.channels_last)
        found = {}
        for name, rows in splits.items():
            right = []
            for batch in tqdm(
                DataLoader(rows, batch_size=64, collate_fn=default_data_collator), desc=f"plain, {name}"
            ):
                with torch.inference_mode():
                    answers = network(batch["pixel_values"].to(memory_format=torch.channels_last)).argmax(-1)
                right.append(answers == batch["labels"])
            found[name] = torch.cat(right).float().mean().item()
        path.write_text(json.dumps(found), encoding="utf-8")
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return known


def find_policy(engine: Any, search: Any, least: float, batch_size: int, margin: float) -> ExitConfig:
    """Return the fastest policy at an accuracy, or with all exits off where none reaches it."""
    points = []
    target = {"min_accuracy": least, "accuracy_margin": margin}
    for fallback in ("ensemble", "deepest"):
        try:
            points.append(calibrate(engine, search, batch_size=batch_size, fallback=fallback, **target))
        except ValueError as error:  # nothing reaches it
            print(error)
    off = ExitConfig(thresholds=[None] * (engine.num_exits - 1), fallback="deepest")
    best = min(points, key=lambda point: point.search["cost"], default=off)
    return best if best is off or best.search["cost"] < 1 else off


def engines_of(model: ScanForImageClassification, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the engines to measure, by name, with how each loads a folder that was saved with a policy."""
    found: dict[str, Any] = {}
    for runtime in (ORT, *([OPENVINO] if arguments.openvino else [])):
        for precision, subfolder in PRECISIONS.items():
            if (work / "export" / subfolder / "onnx").is_dir():
                found[f"{runtime}, {precision}"] = (
                    load_engine(runtime, work / "export", subfolder, arguments.threads),
                    runtime,
                )
    if arguments.compile:
        found[PYTORCH] = model.to(memory_format=torch.channels_last), None
    return found


def calls_of(engine: Any, runtime: str | None, policy: ExitConfig, work: Path, threads: int) -> list[Any]:
    """Return the plain and the adaptive network as functions of a batch."""
    if runtime is not None:
        return [engine.plain, deployed(runtime, engine, policy, work, threads).predict_adaptive]
    plain = torch.compile(engine.backbone)
    engine.compile_stages()

    def run(call: Any, batch: np.ndarray, **settings: Any) -> Any:
        with torch.inference_mode():
            return call(torch.from_numpy(batch).to(memory_format=torch.channels_last), **settings)

    return [
        lambda batch: run(plain, batch),
        lambda batch: run(engine.predict_adaptive, batch, exit_config=policy),
    ]


def speedup(calls: list[Any], images: np.ndarray, batch_size: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return the median of the rounds' ratios, and the median milliseconds of an image, plain and adaptive."""
    clock = time.process_time if threads == 1 else time.perf_counter
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    seconds: list[list[float]] = []
    for number in range(rounds + 1):
        pair = []
        for call in calls:
            start = clock()
            for batch in batches:
                call(batch)
            pair.append(clock() - start)
        if number > 0:  # the first warms up
            seconds.append(pair)
    ratios = [plain / adaptive for plain, adaptive in seconds]
    plain_ms, adaptive_ms = (1000 * statistics.median(one) / len(images) for one in zip(*seconds))
    return {
        "plain_ms": plain_ms,
        "adaptive_ms": adaptive_ms,
        "speedup": statistics.median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "clock": "CPU time of the process" if threads == 1 else "wall",
        "load_average": os.getloadavg()[0],
    }


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows, in place of earlier ones of the same settings. Networks stay in the order in which they came."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    order = list(dict.fromkeys(row["network"] for row in [*known, *rows]))
    new = {tuple(row[name] for name in SAME) for row in rows}
    kept = [row for row in known if tuple(row[name] for name in SAME) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    found = sorted([*kept, *rows], key=lambda row: order.index(row["network"]))
    scratch.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def shown(parts: list[str]) -> list[str]:
    """Return the command line without the folders of this machine, and without where it keeps its files."""
    kept = [part for at, part in enumerate(parts) if not {"--work", "--output"} & {part, parts[max(0, at - 1)]}]
    return [f"runs/{Path(part).name}" if os.path.isabs(part) else part for part in kept]


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    model = ScanForImageClassification.from_pretrained(arguments.model).eval()
    splits, dataset, seed = load_splits(arguments)
    work = arguments.work or arguments.model / "networks"
    work.mkdir(parents=True, exist_ok=True)
    plain = None if arguments.plain is None else plain_right(arguments.plain, splits, work)
    if not (work / "export").is_dir():
        model.export_onnx(work / "export", calibration_dataset=splits["search"] if arguments.int8 else None)
    images = np.stack([np.asarray(splits["test"][index]["pixel_values"]) for index in range(arguments.images)])
    facts = {
        "network": arguments.name or arguments.model.name,
        "backbone": model.config.backbone,
        "pixels": model.config.image_size,
        "dataset": Path(dataset).name,
        "split": "test",
        "n": len(splits["test"]),
        "seed": seed,
        "max_accuracy_drop": arguments.drop,
        "threads": arguments.threads,
        "machine": describe_machine(),
        "command": f"python {shlex.join(arguments.shown)}",
    }
    for name, (engine, runtime) in engines_of(model, work, arguments).items():
        folder = work / name.replace(", ", "_")
        folder.mkdir(exist_ok=True)
        tables = {split: kept_table(engine, kept, split, folder / f"{split}.st") for split, kept in splits.items()}
        costs = measure_costs(engine, max(arguments.batch_sizes), rounds=arguments.rounds)
        engine.exit_config = engine.exit_config.replace(costs=costs)
        # INT8's twin is the backbone in INT8, as nobody has quantised the one that was trained alone.
        twin = None if name.endswith("INT8") else plain
        for batch_size in arguments.batch_sizes:
            row = measured_row(name, engine, tables, twin, batch_size, arguments)
            calls = calls_of(engine, runtime, row.pop("policy"), folder / f"policy_{batch_size}", arguments.threads)
            row |= speedup(calls, images, batch_size, arguments.rounds, arguments.threads)
            keep([{**facts, **row}], arguments.output)
            print(
                f"{name}, batch {batch_size}: {row['plain_accuracy']:.2%} plain, {row['adaptive_accuracy']:.2%} "
                f"adaptive, {row['speedup']:.2f}x ({row['plain_ms']:.2f} to {row['adaptive_ms']:.2f} ms)",
                flush=True,
            )


def measured_row(
    name: str,
    engine: Any,
    tables: dict[str, Any],
    twin: dict[str, float] | None,
    batch_size: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return the policy of an engine for a batch size, and its accuracies on the test split."""
    own = {split: float((table.deepest == table.labels).mean()) for split, table in tables.items()}
    goal = own if twin is None else twin
    margin = margin_of(arguments.model)
    policy = find_policy(engine, tables["search"], goal["search"] - arguments.drop / 100, batch_size, margin)
    test = tables["test"]
    right = test.logits.argmax(-1) == test.labels[:, None]
    return {
        "policy": policy,
        "runtime": name,
        "batch_size": batch_size,
        "baseline": f"plain network, {name}",
        "plain": "its own deepest exit" if twin is None else "trained alone",
        "plain_accuracy": goal["test"],
        "exit_accuracies": [float(share) for share in right.mean(axis=0)],
        "ensemble_accuracy": float((test.logits.mean(axis=1).argmax(-1) == test.labels).mean()),
        "adaptive_accuracy": answers_by(policy, test)["accuracy"],
        "thresholds": policy.thresholds,
        "fallback": policy.fallback,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained network with exits")
    parser.add_argument("--plain", type=Path, help="folder of its twin, trained alone")
    parser.add_argument("--name", help="of the network in the results; the folder's otherwise")
    parser.add_argument("--work", type=Path, help="folder for exports and logits; in the model's otherwise")
    parser.add_argument("--dataset_name", help="what the model was trained on; the quickstart's digits otherwise")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--holdout", type=float, help="share of the train images that its run held out")
    parser.add_argument("--drop", type=float, default=0.0, help="points that may be lost on the search split")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=128, help="test images that are timed")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave PyTorch out")
    parser.add_argument("--no-openvino", dest="openvino", action="store_false", help="leave OpenVINO out")
    parser.add_argument("--no-int8", dest="int8", action="store_false", help="leave INT8 out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    given = parser.parse_args()
    given.shown = shown(sys.argv)
    main(given)
