"""Adaptive inference where classifiers are deployed: ONNX Runtime in float32 and INT8, OpenVINO, compiled PyTorch.

    python benchmarks/deploy.py --model runs/quickstart --work runs/deploy/quickstart
    python benchmarks/deploy.py --model runs/cifar100 --work runs/deploy/cifar100 --dataset_name uoft-cs/cifar100 \
        --image_column img --label_column fine_label
    python benchmarks/deploy.py --backbone resnet50 --work runs/deploy/resnet50
    python benchmarks/deploy.py --table

The network is exported with images of its search split to calibrate INT8. Thresholds are found for each engine and
precision on its own logits of the search split and its own measured costs, for one image and for batches, so that no
more accuracy is lost than allowed against its own plain network; accuracies are those of the test split. `--backbone`
measures a network with random weights, of which only the overhead when no image leaves is of interest.

Times are of real images, each contender in turns, medians over rounds: process CPU time for one thread, which other
programs on the machine disturb less, and the wall clock for more. `--work` keeps the export, the logits and the
thresholds, so that a call goes on where the one before stopped; `--stop_before` divides the work. The JSON file gets
every setting as soon as it is measured; `--table` prints it for the documentation.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tuned import TUNING, restart_tuned


if __name__ == "__main__":
    restart_tuned()

import numpy as np
import onnxruntime
import torch
from adaptive import NOTHING_LEAVES, load_splits

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, apply_exit_rule, calibrate, measure_costs
from hf_scan.calibration import ExitTable, collect_exit_logits
from hf_scan.costs import describe_machine
from hf_scan.runtime import ORTScanForImageClassification, OVScanForImageClassification, threaded_options


ORT, OPENVINO, PYTORCH = "ONNX Runtime", "OpenVINO", "PyTorch, compiled"
PRECISIONS = {"float32": "", "INT8": "int8"}
STEPS = ("thresholds", "times")
TUNED_FOR = (1, 64)  # batch sizes that thresholds are found for
BATCHES = (1, 8, 64)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


@dataclass
class Contender:
    """
    Something that answers images.

    Args:
        engine (`str`): What runs it, with its precision.
        form (`str`): `"plain"`, `"nothing leaves"` or `"adaptive, ... points"`.
        call (`Callable`): Takes a batch.
        accuracy (`float`, *optional*): On the test split; None for random weights.
        batch_sizes (`tuple[int, ...]`): Those that it is for.
        milliseconds (`dict[str, float]`): For one image, by batch size.
        spread (`dict[str, list[float]]`): The least and the most of the rounds.
    """

    engine: str
    form: str
    call: Callable[[Any], Any] = field(repr=False)
    accuracy: float | None = None
    batch_sizes: tuple[int, ...] = BATCHES
    milliseconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, list[float]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what the JSON file says of it."""
        return {
            name: getattr(self, name)
            for name in ("engine", "form", "batch_sizes", "accuracy", "milliseconds", "spread")
        }


# Engines: the same export in each runtime, and PyTorch.


def available_engines(folder: Path, openvino: bool) -> Iterator[tuple[str, str, str]]:
    """Yield the name, runtime and subfolder of every engine that an export can be run by here."""
    for runtime in (ORT, *([OPENVINO] if openvino and find_spec("openvino") is not None else [])):
        for precision, subfolder in PRECISIONS.items():
            if (folder / subfolder / "onnx").is_dir():
                yield f"{runtime}, {precision}", runtime, subfolder


def load_engine(runtime: str, folder: Path, subfolder: str, threads: int) -> Any:
    """Return an engine for an export, with so many threads, which do not spin while they wait."""
    if runtime == OPENVINO:
        settings = {"INFERENCE_NUM_THREADS": threads}
        return OVScanForImageClassification.from_pretrained(folder, subfolder=subfolder, ov_config=settings)
    options = threaded_options(threads)
    return ORTScanForImageClassification.from_pretrained(folder, subfolder=subfolder, session_options=options)


def deployed(runtime: str, engine: Any, point: ExitConfig, folder: Path, threads: int) -> Any:
    """Return an engine saved with a policy and loaded again, so that `adaptive.onnx` has its rule."""
    kept, engine.exit_config = engine.exit_config, point
    engine.save_pretrained(folder)
    engine.exit_config = kept
    return load_engine(runtime, folder, "", threads)


def kept_table(engine: Any, rows: Any, split: str, path: Path) -> ExitTable:
    """Return the logits of a split, read from a file if they have been collected before."""
    if not path.is_file():
        collect_exit_logits(engine, rows, split).save(path)
    return ExitTable.load(path)


def margin_of(folder: Path) -> float:
    """Return the points that the choice of a network's exits needs, on the images that have chosen them."""
    return float((ExitConfig.from_pretrained(folder).search or {}).get("accuracy_margin", 0.0))


def find_points(
    engine: Any, table: ExitTable, drops: list[float], margin: float, path: Path, threads: int
) -> dict[str, Any]:
    """
    Return the fastest policies found by drop and batch size, read from a file if they have been found before.

    Args:
        engine: Its costs are measured, for batches up to the largest.
        table ([`ExitTable`]): The search split's.
        drops (`list[float]`): Points that may be lost against the engine's own plain network.
        margin (`float`): Points that are kept above that.
        path (`Path`): The file.
        threads (`int`): With which costs are measured.
    """
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    wanted = [(drop, size) for drop in drops for size in TUNED_FOR if f"{drop} {size}" not in found]
    if not wanted:
        return found
    engine.exit_config = engine.exit_config.replace(costs=measure_costs(engine, max(TUNED_FOR), threads=threads))
    least = float((table.deepest == table.labels).mean())
    for drop, size in wanted:
        points = []
        for fallback in ("ensemble", "deepest"):
            try:
                target = {"min_accuracy": least - drop / 100, "accuracy_margin": margin}
                points.append(calibrate(engine, table, batch_size=size, fallback=fallback, **target))
            except ValueError as error:  # nothing reaches it
                print(error)
        best = min(points, key=lambda point: point.search["cost"], default=None)
        found[f"{drop} {size}"] = None if best is None else best.rule
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def exported_contenders(
    name: str, runtime: str, subfolder: str, splits: dict[str, Any] | None, arguments: argparse.Namespace
) -> tuple[list[Contender], dict[str, Any]]:
    """Return the contenders of one engine, and the facts on it."""
    work, threads = arguments.work, arguments.threads
    engine = load_engine(runtime, work / "export", subfolder, threads)
    nothing = ExitConfig(thresholds=[NOTHING_LEAVES] * engine.num_exits, fallback="deepest")
    scratch = work / name.replace(", ", "_")
    silent = deployed(runtime, engine, nothing, scratch / "nothing", threads)
    found = [Contender(name, "plain", engine.plain), Contender(name, "nothing leaves", silent.predict_adaptive)]
    folder = work / "export" / subfolder
    facts: dict[str, Any] = {"megabytes": sum(p.stat().st_size for p in (folder / "onnx").iterdir()) / 1e6}
    if splits is None:
        return found, facts
    tables = {split: kept_table(engine, rows, split, scratch / f"{split}.st") for split, rows in splits.items()}
    if arguments.stop_before == "thresholds":
        return found, facts

    def call(policy: ExitConfig, key: str) -> Callable[[Any], Any]:
        folder = scratch / key.replace(" ", "_")
        return deployed(runtime, engine, policy, folder, threads).predict_adaptive

    margin, path = margin_of(arguments.model), scratch / f"points_{threads}.json"
    points = find_points(engine, tables["search"], arguments.drops, margin, path, threads)
    return adaptive_contenders(found, facts, points, tables["test"], call)


def adaptive_contenders(
    found: list[Contender],
    facts: dict[str, Any],
    points: dict[str, Any],
    test: ExitTable,
    call_of: Callable[[ExitConfig, str], Callable[[Any], Any]],
) -> tuple[list[Contender], dict[str, Any]]:
    """Return an engine's contenders and facts with its operating points and the accuracies on the test split."""
    found[0].accuracy = found[1].accuracy = float((test.deepest == test.labels).mean())
    facts["accuracy of each exit"] = (test.logits.argmax(-1) == test.labels[:, None]).mean(0).tolist()
    facts["points"] = {}
    for key, rule in points.items():
        if rule is not None:
            drop, size = key.split()
            form, policy = f"adaptive, {drop} points", ExitConfig(**rule)
            answers = answers_by(policy, test)
            sizes = tuple(other for other in BATCHES if (other == 1) == (size == "1"))
            accuracy = answers.pop("accuracy")
            found.append(Contender(found[0].engine, form, call_of(policy, key), accuracy, sizes))
            facts["points"][f"{form}, for batches of {size}"] = {**rule, **answers}
    return found, facts


def answers_by(policy: ExitConfig, table: ExitTable) -> dict[str, Any]:
    """Return the accuracy of a policy on a split, and the share that leaves at each exit."""
    answers = apply_exit_rule(torch.from_numpy(table.logits).unbind(dim=1), policy)
    shares = torch.bincount(answers.exit_index, minlength=table.num_exits + 1) / len(table)
    right = answers.logits.argmax(-1).numpy() == table.labels
    return {"accuracy": float(right.mean()), "shares on the test split": shares.tolist()}


def pytorch_contenders(
    model: ScanForImageClassification, tables: dict[str, ExitTable] | None, arguments: argparse.Namespace
) -> tuple[list[Contender], dict[str, Any]]:
    """Return the compiled networks. Their logits are those of ONNX Runtime in float32, but for rounding."""

    def answer(call: Callable[..., Any], batch: np.ndarray) -> Any:
        with torch.inference_mode():
            return call(torch.from_numpy(batch).to(memory_format=torch.channels_last))

    model = model.to(memory_format=torch.channels_last)
    plain = torch.compile(copy.deepcopy(model.backbone))
    fast = copy.deepcopy(model)
    fast.compile_stages()
    nothing = ExitConfig(thresholds=[NOTHING_LEAVES] * model.num_exits, fallback="deepest")
    silent = partial(answer, partial(fast.predict_adaptive, exit_config=nothing))
    found = [Contender(PYTORCH, "plain", partial(answer, plain)), Contender(PYTORCH, "nothing leaves", silent)]
    if tables is None:
        return found, {}
    path = arguments.work / f"points_{arguments.threads}.json"
    search = replace(tables["search"], model=fast.fingerprint())
    points = find_points(fast, search, arguments.drops, margin_of(arguments.model), path, arguments.threads)

    def call_of(policy: ExitConfig, _: str) -> Callable[[Any], Any]:
        return partial(answer, partial(fast.predict_adaptive, exit_config=policy))

    return adaptive_contenders(found, {}, points, tables["test"], call_of)


# Measuring.


def measure(contenders: list[Contender], images: np.ndarray, batch_size: int, rounds: int, clock: Any) -> None:
    """Fill in everyone's times at a batch size, all in turns."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    entries = [contender for contender in contenders if batch_size in contender.batch_sizes]
    seconds: list[list[float]] = [[] for _ in entries]
    for number in range(rounds + 1):
        for contender, own in zip(entries, seconds):
            start = clock()
            for batch in batches:
                contender.call(batch)
            if number > 0:  # the first warms up
                own.append(1000 * (clock() - start) / len(images))
    for contender, own in zip(entries, seconds):
        contender.milliseconds[str(batch_size)] = statistics.median(own)
        contender.spread[str(batch_size)] = [min(own), max(own)]


def times_of(contenders: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Return the times by engine, form and batch size."""
    return {(c["engine"], c["form"], size): ms for c in contenders for size, ms in c["milliseconds"].items()}


def ratios(contenders: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the times mean, by batch size."""
    times = times_of(contenders)
    for (engine, form, size), own in times.items():
        compared = {"plain in the same engine": (engine, "plain"), f"the same in {PYTORCH}": (PYTORCH, form)}
        if form == "plain":
            compared["plain in ONNX Runtime, same precision"] = (engine.replace(OPENVINO, ORT), "plain")
        for what, (other, kind) in compared.items():
            if (other, kind, size) in times and (other, kind) != (engine, form):
                value = times[other, kind, size] / own
                yield {"engine": engine, "form": form, "batch_size": int(size), "faster than": what, "times": value}


def run(
    network: dict[str, Any], contenders: list[Contender], images: np.ndarray, arguments: argparse.Namespace
) -> None:
    """Measure all batch sizes, and write each when it is there."""
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    for batch_size in arguments.batch_sizes:
        torch.compiler.reset()  # compiled code is at best for a batch size
        # Large images take long enough by themselves.
        count = 24 + batch_size if images[0].size < 50_000 else max(4, batch_size)
        chosen = images[: max(1, min(count, len(images)) // batch_size) * batch_size]
        measure(contenders, chosen, batch_size, arguments.rounds, clock)
        save(network, contenders, batch_size, arguments)
        for contender in contenders:
            if str(batch_size) in contender.milliseconds:
                low, high = contender.spread[str(batch_size)]
                time_ = contender.milliseconds[str(batch_size)]
                print(f"batch {batch_size}: {contender.engine}, {contender.form} {time_:.3f} [{low:.3f}, {high:.3f}]")


def save(network: dict[str, Any], contenders: list[Contender], batch_size: int, arguments: argparse.Namespace) -> None:
    """Write what is known of a network by now. Times of other batch sizes with the same thresholds are kept."""
    path = arguments.output
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    same = ("network", "threads")
    entry = {**network, "load average": {}, "contenders": [contender.facts() for contender in contenders]}
    others = []
    for other in known:
        if any(other[name] != entry[name] for name in same):
            others.append(other)
        elif other["engines"] == entry["engines"]:
            entry["load average"] = other["load average"]
            earlier = {(c["engine"], c["form"], tuple(c["batch_sizes"])): c for c in other["contenders"]}
            for own in entry["contenders"]:
                before = earlier.get((own["engine"], own["form"], own["batch_sizes"]), own)
                for name in ("milliseconds", "spread"):
                    own[name] = {**before[name], **own[name]}
    entry["load average"][str(batch_size)] = os.getloadavg()[0]
    entry["ratios"] = list(ratios(entry["contenders"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps([*others, entry], indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    work, splits, images = arguments.work, None, None
    if arguments.model is not None:
        model = ScanForImageClassification.from_pretrained(arguments.model).eval()
        splits, dataset, seed = load_splits(arguments)
        title = arguments.dataset_name or dataset
        data = {"dataset": Path(title).name if Path(title).exists() else title, "seed": seed}
        data["splits"] = {name: len(rows) for name, rows in splits.items()}
        images = np.stack([np.asarray(splits["test"][index]["pixel_values"]) for index in range(128)])
        calibration = splits["search"]
    else:
        torch.manual_seed(0)
        config = ScanConfig(backbone=arguments.backbone, num_labels=100, **arguments.config)
        model = ScanForImageClassification(config).eval()
        size = model.config.image_size
        data, calibration = {"dataset": "noise, and random weights"}, torch.rand(64, 3, size or 0, size or 0)
        images = calibration.numpy()
    if not (work / "export").is_dir():
        model.export_onnx(work / "export", calibration_dataset=calibration)
    network: dict[str, Any] = {
        "network": arguments.name or (arguments.model or work).name,
        "threads": arguments.threads,
        "backbone": model.config.backbone,
        "pixels": model.config.image_size,
        **data,
        "machine": describe_machine(),
        "instructions": instructions(),
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, **openvino_version()},
        "clock": f"{'CPU time of the process' if arguments.threads == 1 else 'wall'}, in turns, medians of "
        f"{arguments.rounds} rounds",
        "environment": TUNING,
        "megabytes of float32 weights": sum(p.numel() for p in model.parameters()) * 4 / 1e6,
        "engines": {},
    }
    contenders: list[Contender] = []
    for name, runtime, subfolder in available_engines(work / "export", arguments.openvino):
        found, network["engines"][name] = exported_contenders(name, runtime, subfolder, splits, arguments)
        contenders += found
    if arguments.stop_before == "thresholds":
        return
    if arguments.compile:
        tables = None
        if splits is not None:
            folder = work / f"{ORT}, float32".replace(", ", "_")
            tables = {split: ExitTable.load(folder / f"{split}.st") for split in splits}
        found, network["engines"][PYTORCH] = pytorch_contenders(model, tables, arguments)
        contenders += found
    if arguments.stop_before != "times":
        run(network, contenders, images, arguments)


def instructions() -> list[str]:
    """Return which of the instructions that matter here the processor has."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return [name for name in INSTRUCTIONS if name in flags]


def openvino_version() -> dict[str, str]:
    """Return the version of OpenVINO, if it is installed."""
    if find_spec("openvino") is None:
        return {}
    import openvino

    return {"openvino": openvino.__version__.split("-")[0]}


# The table.


def table(path: Path) -> Iterator[str]:
    """Yield the lines of the documentation's tables."""
    for entry in json.loads(path.read_text(encoding="utf-8")):
        threads = f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"
        of = f"{entry['backbone']}, {entry['pixels']} pixels, {entry['dataset']}"
        counts = f", {entry['splits']['test']:,} test images, seed {entry['seed']}" if "splits" in entry else ""
        yield f"### {entry['network']}, {threads}\n"
        yield f"{of}{counts}. Milliseconds for an image ({entry['clock']}; {entry['machine']}); in brackets, times as"
        yield "fast as the plain network in the same engine.\n"
        yield "| engine | form | accuracy | batch 1 | batch 8 | batch 64 |\n|---|---|---|---|---|---|"
        times = times_of(entry["contenders"])
        rows: dict[tuple[str, str], dict[str, str]] = {}
        accuracies: dict[tuple[str, str], list[str]] = {}
        for contender in entry["contenders"]:
            key = contender["engine"], contender["form"]
            if contender["accuracy"] is not None:
                text = f"{contender['accuracy']:.2%}"
                accuracies[key] = [*(one for one in accuracies.get(key, []) if one != text), text]
            for size, own in contender["milliseconds"].items():
                plain = times.get((contender["engine"], "plain", size))
                faster = "" if plain is None or contender["form"] == "plain" else f" ({plain / own:.2f})"
                rows.setdefault(key, {})[size] = f"{own:.3f}{faster}"
        for key, cells in rows.items():
            sizes = " | ".join(cells.get(str(size), "") for size in BATCHES)
            yield f"| {key[0]} | {key[1]} | {' / '.join(accuracies.get(key, []))} | {sizes} |"
        yield ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained network")
    parser.add_argument("--backbone", help="a network with random weights instead")
    parser.add_argument("--config", type=json.loads, default={}, help="its further configuration, as JSON")
    parser.add_argument("--name", help="of the network in the results; the folder's otherwise")
    parser.add_argument("--work", type=Path, help="folder for exports, logits and thresholds")
    parser.add_argument("--dataset_name", help="what the model was trained on; the quickstart's digits otherwise")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--holdout", type=float, help="share of the train images that its run held out")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.0, 1.0], help="points that may be lost")
    parser.add_argument("--batch_sizes", type=int, nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="times that each is measured")
    parser.add_argument("--stop_before", choices=STEPS, help="leave the rest to a later call")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave PyTorch out")
    parser.add_argument("--no-openvino", dest="openvino", action="store_false", help="leave OpenVINO out")
    parser.add_argument("--table", action="store_true", help="print the results as tables")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/deploy.json"), help="file to write")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(given.output)))
    elif given.work is None or (given.model is None) == (given.backbone is None):
        parser.error("Pass --work, and either --model or --backbone.")
    else:
        main(given)
