"""Adaptive inference against the plain network and against others, on the clock.

    python benchmarks/adaptive.py --model runs/quickstart
    python benchmarks/adaptive.py --model runs/cifar100 --dataset_name uoft-cs/cifar100 --image_column img \
        --label_column fine_label --plain runs/cifar100_plain --smaller runs/cifar100_small

`--model`, `--plain` and `--smaller` are folders that `examples/train.py` wrote (the first without, the others with
`--plain`); the quickstart's model is measured on its digits. Thresholds are found on the split that the model's run
kept for that, from costs that are measured here first; accuracies are those of the whole test split, times are of its
first images, each contender in turns, medians over rounds. Writes a table, a plot and a JSON file. For `earlyon`:
`pip install earlyon`.
"""

import argparse
import copy
import ctypes
import json
import math
import multiprocessing
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tuned import TUNING, restart_tuned


if __name__ == "__main__":
    restart_tuned()

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoImageProcessor, TimmWrapperForImageClassification, default_data_collator


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import quickstart
from adaptive_peers import cascade, cascade_threshold, earlyon

from hf_scan import (
    ExitConfig,
    ScanConfig,
    ScanForImageClassification,
    apply_exit_rule,
    calibrate,
    measure_costs,
    predicted_speedup,
    realised_speedup,
)
from hf_scan.calibration import collect_exit_logits
from hf_scan.costs import describe_machine, interleaved_medians
from hf_scan.data import eval_transform
from hf_scan.model.exit_criteria import confidence_of
from hf_scan.workflows import data_arguments


BATCH_SIZES = (1, 8, 64)
THREADS = (1, 2)
DROPS = (0.0, 0.5, 1.0)  # points that an operating point may lose on the search split
TUNED_FOR = (1, 64)  # batch sizes that operating points are found for
SPLITS = ("search", "test")


@dataclass
class Contender:
    """
    Something that answers images.

    Args:
        name (`str`): What it is called in the table.
        kind (`str`): What it is a variant of.
        right (`dict[int, torch.Tensor]`): By batch size, whether its answer to each image of the test split is right,
            computed from logits.
        networks (`tuple[nn.Module, ...]`): What it is made of.
        answer (`Callable`): Takes a batch; with `stream`, all of them.
        batch_sizes (`tuple[int, ...]`): Those that it is for.
        milliseconds (`dict[str, float]`): For one image, by threads and batch size; measured later.
    """

    name: str
    kind: str
    right: dict[int, torch.Tensor]
    networks: tuple[nn.Module, ...]
    answer: Callable[[Any], Any]
    stream: bool = False
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return float(self.right[1].float().mean())

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for network in self.networks for parameter in network.parameters())

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for network in self.networks for value in network.state_dict().values())

    @torch.inference_mode()
    def answers(self, batches: tuple[torch.Tensor, ...]) -> list[Any]:
        return self.answer(batches) if self.stream else [self.answer(batch) for batch in batches]

    def check(self, batches: tuple[torch.Tensor, ...], labels: torch.Tensor) -> None:
        """That it really answers what its accuracy was computed from, but for what rounding turns."""
        outputs = self.answers(batches)
        logits = torch.cat([output if isinstance(output, torch.Tensor) else output.logits for output in outputs])
        if self.stream:
            logits = logits[torch.cat([output.ids for output in outputs]).argsort()]
        right = logits.argmax(-1) == labels[: len(logits)]
        agreement = float((right == self.right[len(batches[0])][: len(logits)]).float().mean())
        if agreement < 0.98:
            raise RuntimeError(f"{self.name} answers only {agreement:.1%} of the images as its accuracy says.")


class Networks:
    """The networks that are compared, and what they answer on the splits to search and to test on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = ScanForImageClassification.from_pretrained(arguments.model).eval()
        self.model.to(memory_format=torch.channels_last)
        self.splits, self.dataset, self.seed = load_splits(arguments)
        tables = {name: collect_exit_logits(self.model, rows, name) for name, rows in self.splits.items()}
        self.tables = tables
        self.labels = {name: torch.from_numpy(table.labels) for name, table in tables.items()}
        self.exit_logits = {name: torch.from_numpy(table.logits).unbind(dim=1) for name, table in tables.items()}
        # Without a plain network that was trained as such, the deepest exit stands for it.
        self.plain: nn.Module = self.model.backbone
        self.plain_logits = {name: logits[-1] for name, logits in self.exit_logits.items()}
        if arguments.plain is not None:
            self.plain, self.plain_logits = self.load(arguments.plain)
        self.smaller, self.smaller_logits = (None, {}) if arguments.smaller is None else self.load(arguments.smaller)
        self.own = self.model.exit_config
        self.compiled: ScanForImageClassification | None = None
        if arguments.compile:
            self.compiled = copy.deepcopy(self.model)
            self.compiled.compile_stages()
        # Of the form that is fastest.
        costs = measure_costs(self.compiled or self.model, batch_size=max(BATCH_SIZES), threads=1)
        self.model.exit_config = self.own.replace(costs=costs)
        # What an exit costs for a single image, beside what it saves, it does not cost in a batch.
        wanted = [(drop, size) for drop in DROPS for size in TUNED_FOR]
        self.points = {(drop, size): self.operating_point(drop, size, "ensemble", "deepest") for drop, size in wanted}

    def load(self, folder: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        network = TimmWrapperForImageClassification.from_pretrained(folder).timm_model.eval()
        network.to(memory_format=torch.channels_last)
        logits = {}
        for name, rows in self.splits.items():
            loader = DataLoader(rows, batch_size=64, collate_fn=default_data_collator)
            with torch.inference_mode():
                logits[name] = torch.cat([network(batch["pixel_values"]) for batch in tqdm(loader, leave=False)])
        return network, logits

    def right(self, logits: torch.Tensor) -> dict[int, torch.Tensor]:
        """For answers to the test split that do not depend on the batch."""
        return dict.fromkeys(BATCH_SIZES, logits.argmax(-1) == self.labels["test"])

    def right_as_earlyon(self, exit_config: ExitConfig) -> dict[int, torch.Tensor]:
        """For its rule, by which a batch leaves where all of it is sure enough."""
        right = {}
        for batch_size in BATCH_SIZES:
            answers = []
            for batch in zip(*(logits.split(batch_size) for logits in self.exit_logits["test"])):
                sure = [
                    threshold is not None and threshold < 1 and bool((confidence_of(logits) >= threshold).all())
                    for logits, threshold in zip(batch, exit_config.resolve(len(batch))[:-1])
                ]
                answers.append(batch[sure.index(True) if any(sure) else -1])
            right[batch_size] = torch.cat(answers).argmax(-1) == self.labels["test"]
        return right

    @property
    def baseline(self) -> float:
        """The plain network's accuracy on the search split."""
        return float((self.plain_logits["search"].argmax(-1) == self.labels["search"]).float().mean())

    def operating_point(self, drop: float, batch_size: int, *fallbacks: str) -> ExitConfig | None:
        """What takes the least time in batches of a size, of what is at most `drop` points below the plain network on
        the search split."""
        best = None
        for fallback in fallbacks:
            try:
                point = calibrate(
                    self.model,
                    self.tables["search"],
                    min_accuracy=self.baseline - drop / 100,
                    batch_size=batch_size,
                    fallback=fallback,
                )
            except ValueError as error:  # nothing reaches it
                print(error)
                continue
            if best is None or point.search["cost"] < best.search["cost"]:
                best = point
        return best


def load_splits(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, int]:
    """The splits to search and to test on, as the model's run divided them; the dataset's name, and the run's seed."""
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    facts = json.loads((arguments.model / "metrics.json").read_text(encoding="utf-8"))
    if arguments.dataset_name is None:
        splits = quickstart.load_splits()
    else:
        columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
        if (holdout := getattr(arguments, "holdout", None)) is not None:
            columns["holdout"] = holdout
        data = data_arguments.DataArguments(dataset_name=arguments.dataset_name, **columns)
        splits = data_arguments.load_splits(data, facts["seed"], validate="validation" in facts["splits"])
    found, expected = ({name: sizes[name] for name in SPLITS} for sizes in (splits.num_rows, facts["splits"]))
    if found != expected:
        raise ValueError(f"The model's run had splits of {expected} images, and this dataset gives {found}.")
    prepared = {name: splits[name].with_transform(eval_transform(processor)) for name in SPLITS}
    return prepared, facts["dataset"], facts["seed"]


def macs(network: nn.Module, size: int | None) -> float:
    assert size is not None  # the network filled it in
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2


def plain_contenders(networks: Networks, compiles: bool) -> Iterator[Contender]:
    right = networks.right(networks.plain_logits["test"])
    yield from _static("plain", right, networks.plain, compiles)
    contiguous = copy.deepcopy(networks.plain).to(memory_format=torch.contiguous_format)
    answer = lambda images: contiguous(images.contiguous())  # noqa: E731
    yield Contender("plain, channels first", "plain", right, (contiguous,), answer)
    if find_spec("onnxruntime") is not None and find_spec("onnxscript") is not None:
        size = networks.model.config.image_size
        assert size is not None
        answer = onnx_runtime(contiguous, torch.zeros(2, 3, size, size))
        yield Contender("plain, ONNX Runtime", "plain", right, (contiguous,), answer)


def onnx_runtime(network: nn.Module, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Export a network to ONNX and return a function that runs it there, with as many threads as PyTorch has."""
    import onnxruntime

    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    graph = program.model_proto.SerializeToString()
    sessions: dict[int, Any] = {}

    def answer(images: torch.Tensor) -> torch.Tensor:
        threads = torch.get_num_threads()
        if threads not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            sessions[threads] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        session = sessions[threads]
        found = session.run(None, {session.get_inputs()[0].name: images.contiguous().numpy()})
        return torch.from_numpy(found[0])

    return answer


def _static(name: str, right: dict[int, torch.Tensor], network: nn.Module, compiles: bool) -> Iterator[Contender]:
    """A network that computes the same for all images, in channels_last, compiled and not."""
    yield Contender(name, name, right, (network,), network)
    if compiles:
        compiled = torch.compile(copy.deepcopy(network))
        yield Contender(f"{name}, compiled", name, right, (network,), compiled)


def adaptive_contenders(networks: Networks, compiled: ScanForImageClassification | None) -> Iterator[Contender]:
    for (drop, size), point in networks.points.items():
        if point is not None:
            sizes = tuple(other for other in BATCH_SIZES if (other == 1) == (size == 1))
            yield from _variants(f"hf_scan, {drop} points", networks, point, compiled, f" at batch {size}", sizes)
    if networks.own.thresholds is not None:
        yield from _variants("hf_scan, its own", networks, networks.own, compiled)


def _variants(
    kind: str,
    networks: Networks,
    point: ExitConfig,
    compiled: ScanForImageClassification | None,
    suffix: str = "",
    sizes: tuple[int, ...] = BATCH_SIZES,
) -> Iterator[Contender]:
    """Batch by batch and in a stream, compiled and not."""
    right = networks.right(apply_exit_rule(networks.exit_logits["test"], point).logits)
    facts = (kind, right, (networks.model,))
    together = tuple(size for size in sizes if size > 1)
    for model, how in ((networks.model, ""), (compiled, ", compiled")):
        if model is not None:
            name = kind + suffix + how
            yield Contender(name, *facts, partial(model.predict_adaptive, exit_config=point), batch_sizes=sizes)
            if together:
                answer = partial(_stream, model, point)
                yield Contender(f"{name}, refilled", *facts, answer, stream=True, batch_sizes=together)


def _stream(model: ScanForImageClassification, point: ExitConfig, batches: tuple[torch.Tensor, ...]) -> list[Any]:
    return list(model.predict_adaptive_stream(batches, batch_size=len(batches[0]), exit_config=point))


def truncated_contenders(networks: Networks, compiles: bool) -> Iterator[Contender]:
    for index, logits in enumerate(networks.exit_logits["test"][:-1]):
        small = networks.model.truncate(index)
        yield from _static(f"truncated at exit {index}", networks.right(logits), small, compiles)


def other_contenders(networks: Networks, compiled: ScanForImageClassification | None) -> Iterator[Contender]:
    """`earlyon`, and `hf_scan` by the rule that it can follow; a smaller network, alone and in a cascade."""
    model, plain, smaller = networks.model, networks.plain, networks.smaller
    point = networks.operating_point(0.5, max(BATCH_SIZES), "deepest")
    # Modules of its own, for its hooks, and the same tensors: where they lie in memory is worth some percent.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    peer = None if point is None else earlyon(copy.deepcopy(model, memo=shared), point)
    if point is not None and peer is not None:
        yield Contender("earlyon, 0.5 points", "earlyon", networks.right_as_earlyon(point), (model,), peer)
        yield from _variants("hf_scan, as earlyon", networks, point, compiled)
    if smaller is None:
        return
    right = networks.right(networks.smaller_logits["test"])
    yield from _static("smaller plain", right, smaller, compiled is not None)
    found = cascade_threshold(
        networks.smaller_logits["search"],
        networks.plain_logits["search"],
        networks.labels["search"],
        [macs(network, model.config.image_size) for network in (smaller, plain)],
        drop=0.5,
    )
    if found is not None:
        leaves = networks.smaller_logits["test"].softmax(-1).amax(-1) > found
        logits = torch.where(leaves[:, None], networks.smaller_logits["test"], networks.plain_logits["test"])
        both = (smaller, plain)
        facts = ("cascade", networks.right(logits), both)
        yield Contender("cascade, 0.5 points", *facts, cascade(*both, found))
        if compiled is not None:
            fast = [torch.compile(copy.deepcopy(network)) for network in both]
            yield Contender("cascade, 0.5 points, compiled", *facts, cascade(*fast, found))


def timed(images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The images that are timed in batches of a size; a single one takes longer."""
    return images[: 192 + 8 * batch_size]


def measure(entries: list[Contender], images: torch.Tensor, labels: torch.Tensor, rounds: int) -> None:
    """Fills in everyone's times, all in turns."""
    for threads in THREADS:
        torch.set_num_threads(threads)
        for batch_size in BATCH_SIZES:
            torch.compiler.reset()  # compiled code is for a number of threads, and at best for a batch size
            chosen = timed(images, batch_size)
            print(f"{threads} threads, batches of {batch_size}, {len(chosen)} images", flush=True)
            batches = chosen.split(batch_size)
            present = {entry.name: entry for entry in entries if batch_size in entry.batch_sizes}
            for entry in present.values():
                entry.check(batches, labels)
            calls = {name: partial(entry.answers, batches) for name, entry in present.items()}
            for name, seconds in interleaved_medians(calls, rounds, seconds_per_round=0.0).items():
                present[name].milliseconds[setting(threads, batch_size)] = 1000 * seconds / len(chosen)


def setting(threads: int, batch_size: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}, batch {batch_size}"


SETTINGS = [setting(threads, batch_size) for threads in THREADS for batch_size in BATCH_SIZES]


def best(entries: list[Contender], kind: str, where: str, eager: bool = False) -> Contender | None:
    """The fastest variant of something; of those that are not compiled, if so asked."""
    variants = [
        entry
        for entry in entries
        if entry.kind == kind and where in entry.milliseconds and not (eager and "compiled" in entry.name)
    ]
    return min(variants, key=lambda entry: entry.milliseconds[where], default=None)


def times_faster(entries: list[Contender], slow: str, fast: str, where: str, eager: bool = False) -> float | None:
    """The best time of one kind over that of another, where both are there."""
    slowest, fastest = (best(entries, kind, where, eager) for kind in (slow, fast))
    return None if slowest is None or fastest is None else slowest.milliseconds[where] / fastest.milliseconds[where]


def table(entries: list[Contender]) -> str:
    """Milliseconds for one image, and the best plain variant's time over it."""
    head = ["", "accuracy", "drop, points", "parameters", "MB", *SETTINGS]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    plain = {where: best(entries, "plain", where).milliseconds[where] for where in SETTINGS}
    for entry in entries:
        known = entry.milliseconds
        times = [f"{known[s]:.3f} ({plain[s] / known[s]:.2f}x)" if s in known else "" for s in SETTINGS]
        drop = 100 * (entries[0].accuracy - entry.accuracy)
        size = [f"{entry.parameters / 1e6:.2f} M", f"{entry.bytes / 1e6:.2f}"]
        cells = [entry.name, f"{entry.accuracy:.2%}", f"{drop:+.2f}", *size, *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(entries: list[Contender], path: Path) -> None:
    """Accuracy over milliseconds."""
    wanted = [setting(max(THREADS), batch_size) for batch_size in (min(BATCH_SIZES), max(BATCH_SIZES))]
    figure, axes = plt.subplots(1, len(wanted), figsize=(5.5 * len(wanted), 4.2), sharey=True)
    families = list(dict.fromkeys(entry.kind.split(",")[0].split(" at ")[0] for entry in entries))
    for axis, where in zip(axes, wanted):
        for index, family in enumerate(families):
            kinds = dict.fromkeys(entry.kind for entry in entries if entry.kind.startswith(family))
            fastest = [entry for kind in kinds if (entry := best(entries, kind, where)) is not None]
            points = sorted((entry.milliseconds[where], 100 * entry.accuracy) for entry in fastest)
            style = "o-" if len(points) > 1 else "D"
            axis.plot(*zip(*points), style, color=f"C{index}", label=family)
        axis.set_xlabel("milliseconds for one image, best variant")
        axis.set_title(where)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on the test split, %")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def prediction(model: ScanForImageClassification, images: torch.Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """Realised over predicted speed-up, and the engine's time over that of the parts it ran."""
    for threads in THREADS:
        torch.set_num_threads(threads)
        costs = measure_costs(model, batch_size=max(BATCH_SIZES), rounds=rounds)
        for batch_size in BATCH_SIZES:
            chosen = timed(images, batch_size)
            for refilled in (False, True) if batch_size > 1 else (False,):
                found = realised_speedup(model, chosen, batch_size, refilled=refilled, rounds=rounds)
                expected = predicted_speedup(costs, found.shares, model.exit_config, batch_size, refilled)
                where = setting(threads, batch_size) + ", refilled" * refilled
                yield {"what": f"realised / predicted speed-up, {where}", "value": found.speedup / expected}
            ratio = engine_over_parts(model, chosen.split(batch_size), rounds)
            yield {"what": f"engine / its stages and heads, {setting(threads, batch_size)}", "value": ratio}


def engine_over_parts(model: ScanForImageClassification, batches: tuple[torch.Tensor, ...], rounds: int) -> float:
    """The time of `predict_adaptive` over that of the stages and heads in the same calls."""
    inside = 0.0

    def timed(part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            output = part(*arguments)
            inside += time.perf_counter() - start
            return output

        return run

    ratios = []
    names = ("run_stage", "run_exit")
    for name in names:
        setattr(model, name, timed(getattr(model, name)))
    try:
        for _ in range(rounds + 1):
            inside, start = 0.0, time.perf_counter()
            for batch in batches:
                model.predict_adaptive(batch)
            ratios.append((time.perf_counter() - start) / inside)
    finally:
        for name in names:
            delattr(model, name)
    return statistics.median(ratios[1:])


NOTHING_LEAVES = math.nextafter(1.0, 0.0)


def overhead(backbone: str, rounds: int, compiles: bool) -> Iterator[dict[str, Any]]:
    """Time when every exit looks and nothing leaves, over that of the plain network: neither compiled, and both.
    Random weights and images."""
    model = ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=100)).eval()
    model.to(memory_format=torch.channels_last)
    forms: dict[str, tuple[Callable[..., Any], ScanForImageClassification]] = {"": (model.backbone, model)}
    if compiles:
        fast = copy.deepcopy(model)
        fast.compile_stages()
        forms[", compiled"] = (torch.compile(copy.deepcopy(model.backbone)), fast)
    size = model.config.image_size
    policy = ExitConfig(thresholds=[NOTHING_LEAVES] * (model.num_exits - 1))
    for threads in THREADS:
        torch.set_num_threads(threads)
        for batch_size in (1, 64):
            torch.compiler.reset()
            images = torch.rand(batch_size, 3, size, size).to(memory_format=torch.channels_last)
            calls = {}
            for form, (plain, adaptive) in forms.items():
                calls[f"plain{form}"] = partial(plain, images)
                calls[f"adaptive{form}"] = partial(adaptive.predict_adaptive, images, policy)
            with torch.inference_mode():
                seconds = interleaved_medians(calls, rounds, seconds_per_round=0.1)
            for form in forms:
                where = f"{backbone} at {size} pixels{form}, {setting(threads, batch_size)}"
                value = seconds[f"adaptive{form}"] / seconds[f"plain{form}"]
                yield {"what": f"nothing leaves / plain, {where}", "value": value}


class TensorMemory(TorchDispatchMode):
    """The most bytes that tensors hold at a time, of those that are made while it is on."""

    def __init__(self, model: nn.Module, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0
        self.before = {
            tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *tensors)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place and place not in self.before and place not in self.live:
                    self.live[place] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, place, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_memory(folder: Path, leaving: float | None, answer: Any) -> None:
    """
    Puts the most MiB that a batch takes at any time, besides weights and images: of the plain network, or of
    `predict_adaptive` when a share of the batch leaves at each exit. In a process of its own. First what tensors hold,
    then what the process does, to which the allocator adds holes that no tensor fits in.
    """
    model = ScanForImageClassification.from_pretrained(folder).eval().to(memory_format=torch.channels_last)
    size = model.config.image_size
    images = torch.rand(64, 3, size, size).to(memory_format=torch.channels_last)
    call: Callable[[torch.Tensor], Any] = model.backbone
    if leaving is not None:
        with torch.inference_mode():
            scores = [confidence_of(logits) for logits in model(images).exit_logits[:-1]]
        thresholds = [float(score.quantile(1 - leaving)) if leaving else NOTHING_LEAVES for score in scores]
        call = partial(model.predict_adaptive, thresholds=thresholds)
    with torch.inference_mode():
        call(images[:1])  # so that libraries have what they keep
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = memory("VmRSS")
        call(images)
        resident = memory("VmHWM") - before
        with TensorMemory(model, images) as held:
            call(images)
    answer.put((held.peak / 2**20, resident))


def memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def extra_memory(folder: Path) -> Iterator[dict[str, Any]]:
    """Medians of three processes each. Linux only."""
    context = multiprocessing.get_context("spawn")
    peaks: dict[float | None, list[tuple[float, float]]] = {None: [], 0.0: [], 0.5: []}
    for _ in range(3):
        for leaving, values in peaks.items():
            answer = context.SimpleQueue()
            process = context.Process(target=peak_memory, args=(folder, leaving, answer))
            process.start()
            values.append(answer.get())
            process.join()
    for kind, index in (("tensors", 0), ("resident memory", 1)):
        plain, *adaptive = (statistics.median(value[index] for value in values) for values in peaks.values())
        for name, peak in zip(("nothing leaves", "half leaves at each exit"), adaptive):
            what = f"{kind} / plain, batch 64, {name} ({peak:.1f} / {plain:.1f} MiB)"
            yield {"what": what, "value": peak / plain}


def comparisons(entries: list[Contender]) -> Iterator[dict[str, Any]]:
    """The speed-up over the best plain variant and over `earlyon`, best variants against each other."""
    for where in SETTINGS:
        for drop in DROPS:
            speedup = times_faster(entries, "plain", f"hf_scan, {drop} points", where)
            if speedup is not None:
                yield {"what": f"speed-up at {drop} points on the search split, {where}", "value": speedup}
        for eager in (True, False):
            ahead = times_faster(entries, "earlyon", "hf_scan, as earlyon", where, eager)
            if ahead is not None:
                how = "not compiled" if eager else "ours compiled, which earlyon refuses"
                yield {"what": f"time of earlyon / ours by the same thresholds, {how}, {where}", "value": ahead}
    for entry in entries:
        if entry.kind == "earlyon":
            for batch_size, right in entry.right.items():
                what = f"accuracy of earlyon in batches of {batch_size}"
                yield {"what": what, "value": float(right.float().mean())}


def main(arguments: argparse.Namespace) -> None:
    networks = Networks(arguments)
    entries = [
        *plain_contenders(networks, arguments.compile),
        *adaptive_contenders(networks, networks.compiled),
        *truncated_contenders(networks, arguments.compile),
        *other_contenders(networks, networks.compiled),
    ]
    test = networks.splits["test"]
    images = torch.stack([test[row]["pixel_values"] for row in range(min(len(test), 192 + 8 * max(BATCH_SIZES)))])
    images = images.to(memory_format=torch.channels_last)
    measure(entries, images, networks.labels["test"], arguments.rounds)
    figures = list(comparisons(entries))
    if networks.own.thresholds is not None:
        figures += prediction(networks.model, images, arguments.rounds)
    if sys.platform == "linux":
        figures += extra_memory(arguments.model)
    for backbone in tqdm(arguments.overhead, desc="nothing leaves"):
        figures += overhead(backbone, arguments.rounds, arguments.compile)

    torch.set_num_threads(max(THREADS))
    facts = {
        "model": networks.model.config.backbone,
        "dataset": networks.dataset,
        "splits": {name: len(rows) for name, rows in networks.splits.items()},
        "seed": networks.seed,
        "plain network": "the model's deepest exit" if arguments.plain is None else arguments.plain.name,
        "thresholds": {
            f"{drop} points at batch {size}": point and (point.thresholds, point.fallback)
            for (drop, size), point in networks.points.items()
        },
        "images timed": {batch_size: len(timed(images, batch_size)) for batch_size in BATCH_SIZES},
        "rounds": arguments.rounds,
        "machine": describe_machine(),
        "environment": TUNING,
    }
    known = [
        {name: getattr(entry, name) for name in ("name", "kind", "accuracy", "parameters", "bytes", "milliseconds")}
        for entry in entries
    ]
    text = "\n".join(
        [
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            table(entries),
            "",
            *(f"- {figure['what']}: {figure['value']:.3f}" for figure in figures),
        ]
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    values = {**facts, "contenders": known, "figures": figures}
    arguments.output.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    plot(entries, arguments.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart"), help="folder of a trained network")
    parser.add_argument("--plain", type=Path, help="folder of the plain network; the deepest exit otherwise")
    parser.add_argument("--smaller", type=Path, help="folder of a smaller plain network, for itself and a cascade")
    parser.add_argument("--dataset_name", help="what the model was trained on; the quickstart's digits otherwise")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave compiled variants out")
    parser.add_argument(
        "--overhead",
        nargs="*",
        default=["cifar_resnet18", "resnet18", "resnet50"],
        help="backbones to measure when nothing leaves",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/adaptive"), help="files to write, without ending")
    main(parser.parse_args())
