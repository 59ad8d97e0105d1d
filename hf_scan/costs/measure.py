# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Count the multiplications and parameters of stages and heads, and measure their milliseconds and the speed-up."""

import copy
import math
import platform
import statistics
from collections.abc import Callable, Mapping
from timeit import timeit
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import benchmark
from torch.utils.benchmark.utils import timer as clock  # waits for the accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from ..model.adaptive import check_eval_mode
from ..model.evaluation_mode import evaluating
from ..model.exit_criteria import confidence_of
from ..model.exit_rule import AdaptiveOutput
from ..model.stages import StageState, parameters_by_stage
from .allocator import allocator_hint
from .values import ExitCosts, MeasuredCosts, RealisedSpeedup


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


logger = logging.get_logger(__name__)

# Interquartile range over the median. On an idle machine it is a twentieth and less.
WIDE_SPREAD = 0.15


def count_macs(model: "ScanForImageClassification") -> ExitCosts:
    """
    Count the MACs of one image of `config.image_size` with PyTorch's flop counter, in convolutions and matrix
    products. A MAC is two flops.

    Args:
        model ([`ScanForImageClassification`]): The network, on any device.

    Returns:
        [`ExitCosts`]

    Example:

    ```python
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.costs import count_macs

    >>> costs = count_macs(ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)))
    >>> round(costs.plain / 1e6, 1)
    40.8
    ```
    """

    if (known := getattr(model, "counted", None)) is not None:  # an exported network's, when it was exported
        return ExitCosts(**known["macs"])

    def counted(part: Callable[..., Any], index: int, state: StageState) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter:
            output = part(index, state)
        return counter.get_total_flops() // 2, output

    state = StageState.from_images(_example(model, 1, torch.zeros))
    stages: list[float] = []
    heads: list[float] = []
    with evaluating(model), torch.no_grad():
        for index in range(model.num_exits):
            macs, state = counted(model.run_stage, index, state)
            stages.append(macs)
            heads.append(counted(model.run_exit, index, state)[0])
    return ExitCosts(stages, heads)


def count_parameters(model: "ScanForImageClassification") -> ExitCosts:
    """
    Count the parameters of each stage and head. A parameter that several stages use counts with the first of them. The
    projection of an exit head's feature for the hint loss is not counted, as it is used in training only.

    Args:
        model ([`ScanForImageClassification`]): The network, on any device.

    Returns:
        [`ExitCosts`]
    """
    if (known := getattr(model, "counted", None)) is not None:
        return ExitCosts(**known["parameters"])
    found = parameters_by_stage(model.backbone, model.stages)
    stages: list[float] = [sum(parameter.numel() for parameter in own.values()) for own in found]
    heads: list[float] = [
        sum(
            parameter.numel() for name, parameter in head.named_parameters() if not name.startswith("hint_projection.")
        )
        for head in model.exit_heads
    ]
    if not model.config.truncated:
        heads.append(sum(parameter.numel() for parameter in model.backbone.parameters()) - sum(stages))
    return ExitCosts(stages, heads)


def measure_costs(
    model: "ScanForImageClassification",
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    device: torch.device | str | None = None,
    rounds: int = 7,
) -> MeasuredCosts:
    """
    Measure the milliseconds of each stage and head on this machine, at the given batch size and at the powers of two
    below it, as a batch shrinks when images exit. The parts are timed one after another in a pass through the network,
    because each finds the caches as the part before left them, and a head together with the decision that it is for.
    The plain backbone is timed in turns with them, compiled if the stages are. A warning
    says where times vary so much that other work on the machine, or the allocator, must be disturbing them.

    Measure the runtime that will serve: the engine of an export to ONNX
    ([`~hf_scan.runtime.ORTScanForImageClassification`]) takes the model's place.

    Args:
        model ([`ScanForImageClassification`]): The network in evaluation mode, in the memory format that it is used
            in.
        batch_size (`int`, *optional*, defaults to 1): Number of images in a batch.
        dtype (`torch.dtype`, *optional*): The type to compute with. Defaults to the model's.
        threads (`int`, *optional*): Number of threads, on a CPU. Defaults to PyTorch's current number. The engine of
            an export has its number since it was loaded.
        device (`torch.device` or `str`, *optional*): Where to measure. Defaults to the model's device. On another
            device, or with another `dtype`, a copy is measured, whose stages are not compiled.
        rounds (`int`, *optional*, defaults to 7): How often each batch size is measured, for at least 50 milliseconds
            each.

    Returns:
        [`MeasuredCosts`]. After `model.exit_config = model.exit_config.replace(costs=costs)`, they are saved with the
        model.

    Raises:
        `ValueError`: if the model is in training mode, `batch_size`, `threads` or `rounds` are below 1, or `threads`
            is not the number of an engine that was loaded with another.

    Example:

    ```python
    >>> from hf_scan import ScanConfig, ScanForImageClassification, measure_costs, predicted_speedup

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> costs = measure_costs(model, batch_size=4, rounds=3)
    >>> sorted(costs.milliseconds)
    [1, 2, 4]
    >>> half_leave_at_once = predicted_speedup(costs, shares=[0.5, 0.0, 0.0, 0.5])
    ```
    """
    check_eval_mode(model)
    for name, value in {"batch_size": batch_size, "threads": threads, "rounds": rounds}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; expected a whole number of at least 1.")
    threads = _threads_of(model, threads)
    device = torch.device(device or model.device)
    elsewhere = device.type != model.device.type or device.index not in (None, model.device.index)
    if elsewhere or dtype not in (None, model.dtype):
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    sizes = sorted({batch_size, *(2**power for power in range(batch_size.bit_length()))})
    times: dict[int, list[list[float]]] = {size: [] for size in sizes}  # each part's and the backbone's, in seconds
    batches = {size: _example(model, size, torch.rand) for size in sizes}
    plain = _plain(model)

    with benchmark.set_torch_threads(threads), torch.inference_mode():
        repeats = {}
        for size, images in batches.items():
            _time_parts(model, images, plain)  # warms up
            repeats[size] = math.ceil(0.05 / sum(_time_parts(model, images, plain)))
        with logging.tqdm(total=rounds * len(sizes), desc="Measuring the exits' costs", leave=False) as bar:
            for _ in range(rounds):
                for size, images in batches.items():
                    times[size] += [_time_parts(model, images, plain) for _ in range(repeats[size])]
                    bar.update()
        machine = describe_machine(device)

    task = benchmark.TaskSpec("", "", num_threads=threads)
    measured = {
        size: [benchmark.Measurement(1, list(raw), task) for raw in zip(*passes)] for size, passes in times.items()
    }

    def of_parts(statistic: str) -> dict[int, ExitCosts]:
        values = {size: [1000 * getattr(part, statistic) for part in parts] for size, parts in measured.items()}
        return {size: ExitCosts(every[:-1:2], every[1:-1:2]) for size, every in values.items()}

    costs = MeasuredCosts(
        macs=count_macs(model),
        parameters=count_parameters(model),
        milliseconds=of_parts("median"),
        spread=of_parts("iqr"),
        plain={size: 1000 * parts[-1].median for size, parts in measured.items()},
        dtype=str(model.dtype).removeprefix("torch."),
        threads=threads,
        machine=machine,
        plain_spread={size: 1000 * parts[-1].iqr for size, parts in measured.items()},
    )
    _warn_of_noise(costs)
    return costs


def _threads_of(model: Any, threads: int | None) -> int:
    """Return the number of threads to measure with, which an engine has since it was loaded."""
    own: int | None = getattr(model, "threads", None)
    if own is None:
        return threads or torch.get_num_threads()
    if threads not in (None, own):
        raise ValueError(
            f"`threads` is {threads}, and the engine was loaded with {own}; expected the same. Load it anew with "
            "`session_options=threaded_options(threads)` of `hf_scan.runtime`, or OpenVINO's with "
            "`ov_config={'INFERENCE_NUM_THREADS': threads}`."
        )
    return own


def _warn_of_noise(costs: MeasuredCosts) -> None:
    size, noise = max(costs.noise.items(), key=lambda item: item[1])
    if noise <= WIDE_SPREAD:
        return
    hint = allocator_hint()
    logger.warning(
        f"The times of the plain network in batches of {size} vary by {noise:.0%} (interquartile range over median), "
        f"so that small differences between exits mean nothing. Stop other work on the machine and measure again, "
        f"with more `rounds`.{'' if hint is None else ' ' + hint}"
    )


def _time_parts(
    model: "ScanForImageClassification", images: torch.Tensor, plain: Callable[[torch.Tensor], object]
) -> list[float]:
    """Return the seconds of each stage and its head, in order, and of the plain network."""
    if hasattr(model, "time_parts"):  # an exported network runs a stage and its head in one
        return model.time_parts(images)
    state = StageState.from_images(images)
    seconds = []
    for index in range(model.num_exits):
        start = clock.timer()
        state = model.run_stage(index, state)
        middle = clock.timer()
        confidence = confidence_of(model.run_exit(index, state))
        int((confidence > 0.5).sum())  # the decision waits for the device
        seconds += [middle - start, clock.timer() - middle]
    start = clock.timer()
    plain(images)
    return [*seconds, clock.timer() - start]


def _plain(model: "ScanForImageClassification") -> Callable[[torch.Tensor], object]:
    """
    Return the network without early exits, compiled if the stages are. A truncated network is its own.
    """
    if model.config.truncated:
        return model
    compiled = getattr(model, "compiled", None)  # an exported network has none
    if compiled is None:
        return model.backbone
    plain: Callable[[torch.Tensor], object] = torch.compile(model.backbone, **compiled.options)
    return plain


def realised_speedup(
    model: "ScanForImageClassification",
    images: torch.Tensor,
    batch_size: int = 1,
    plain: Callable[[torch.Tensor], object] | None = None,
    refilled: bool = False,
    rounds: int = 7,
) -> RealisedSpeedup:
    """
    Measure the latency of adaptive inference and of the plain backbone on real images, in turns, as medians over
    rounds.

    Args:
        model ([`ScanForImageClassification`]): The network in evaluation mode, with an exit configuration.
        images (`torch.Tensor` of shape `(n, num_channels, height, width)`): Images on the model's device, in its
            memory format. Each round runs all of them.
        batch_size (`int`, *optional*, defaults to 1): Number of images in a batch.
        plain (`Callable`, *optional*): The network to compare with. Defaults to `model.backbone`, compiled with the
            same arguments if the model's stages are.
        refilled (`bool`, *optional*, defaults to `False`): Whether to measure `predict_adaptive_stream` rather than
            `predict_adaptive`.
        rounds (`int`, *optional*, defaults to 7): How often each is measured.

    Returns:
        [`RealisedSpeedup`]
    """
    batches = images.split(batch_size)
    network = _plain(model) if plain is None else plain  # a compiled module has no truth value

    def answers() -> list[AdaptiveOutput]:
        if refilled:
            return list(model.predict_adaptive_stream(batches, batch_size=batch_size))
        return [model.predict_adaptive(batch) for batch in batches]

    def run_plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                network(batch)

    seconds = interleaved_medians({"plain": run_plain, "adaptive": answers}, rounds=rounds, seconds_per_round=0.0)
    # Where samples exit, not which exit the fallback answers with.
    exiting = model.exit_config.replace(fallback="ensemble")
    exits = torch.cat([model.predict_adaptive(batch, exiting).exit_index for batch in batches])
    return RealisedSpeedup(
        batch_size=batch_size,
        refilled=refilled,
        plain=1000 * seconds["plain"] / len(images),
        adaptive=1000 * seconds["adaptive"] / len(images),
        shares=(exits.bincount(minlength=model.num_exits + 1) / len(images)).tolist(),
    )


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int = 7, seconds_per_round: float = 0.2
) -> dict[str, float]:
    """
    Return the median seconds of several calls, measured in turns, so that a machine that slows down affects all alike.

    Args:
        calls (`Mapping[str, Callable]`): The calls to time, by name.
        rounds (`int`, *optional*, defaults to 7): How often each is measured.
        seconds_per_round (`float`, *optional*, defaults to 0.2): The least duration of a measurement. A call is
            repeated to fill it.

    Returns:
        `dict[str, float]`: seconds for one call, by name.
    """

    def seconds(call: Callable[[], object], repeats: int) -> float:
        return timeit(call, number=repeats, timer=clock.timer) / repeats

    repeats = {}
    for name, call in calls.items():
        seconds(call, 2)  # warms up
        repeats[name] = max(1, math.ceil(seconds_per_round / seconds(call, 2)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def describe_machine(device: torch.device | str = "cpu") -> str:
    """Describe the machine in words, for figures that were measured on it."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def _example(model: "ScanForImageClassification", batch_size: int, fill: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Create images of the model's size and type, on its device and in its memory format."""
    size = model.config.image_size
    assert size is not None  # the network filled it in
    if hasattr(model, "manifest"):
        shape, dtype = (batch_size, *model.manifest.image["shape"]), model.dtype
        return fill(shape) if dtype.is_floating_point else torch.randint(0, 256, shape, dtype=dtype)
    images = fill(batch_size, model.config.num_channels, size, size, device=model.device, dtype=model.dtype)
    channels_last = any(weight.ndim == 4 and not weight.is_contiguous() for weight in model.parameters())
    return images.to(memory_format=torch.channels_last) if channels_last else images


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


__all__ = [
    "count_macs",
    "count_parameters",
    "describe_machine",
    "interleaved_medians",
    "measure_costs",
    "realised_speedup",
]
