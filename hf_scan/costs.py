# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What each stage and each head costs: multiplications and parameters counted, milliseconds measured, and what early
exits are worth in these terms."""

import copy
import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from timeit import timeit
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import benchmark
from torch.utils.benchmark.utils.timer import timer  # waits for the accelerator
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from .adaptive import AdaptiveOutput, ExitConfig, check_eval_mode
from .exit_criteria import confidence_of


if TYPE_CHECKING:
    from .modeling_scan import ScanForImageClassification


@dataclass(frozen=True)
class ExitCosts:
    """
    One number for each stage and each head: multiply-accumulate operations (MACs), parameters, or milliseconds.

    Args:
        stages (`list[float]`): One per stage.
        heads (`list[float]`): One per exit; the last is the backbone's own head.
    """

    stages: list[float]
    heads: list[float]

    @property
    def plain(self) -> float:
        """The backbone without early exits."""
        return sum(self.stages) + self.heads[-1]

    def cumulative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """
        All that has run when an exit answers, earlier heads included.

        Args:
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.

        Returns:
            `list[float]`: one per exit, and a last one for the ensemble, whose mean costs nothing to speak of.
        """
        total: float = 0
        costs = []
        for stage, head in zip(self.stages, self.heads_that_run(exit_config)):
            total += stage + head
            costs.append(total)
        return [*costs, total]

    def relative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """The cumulative costs as shares of the plain backbone's."""
        return [cost / self.plain for cost in self.cumulative(exit_config)]

    def heads_that_run(self, exit_config: ExitConfig | None = None) -> list[float]:
        """The heads' costs, 0 for those that the exit configuration does not run."""
        num_exits = len(self.heads)
        runs = [exit_config is None or exit_config.runs_head(index, num_exits) for index in range(num_exits)]
        return [cost if run else 0 for cost, run in zip(self.heads, runs)]


@dataclass(frozen=True)
class MeasuredCosts:
    """
    What [`measure_costs`] found. `exit_config.costs` holds it as a dictionary.

    Args:
        macs ([`ExitCosts`]): MACs of one image. Computed from the shapes.
        parameters ([`ExitCosts`]): Parameters, each counted with the first part that uses it.
        milliseconds (`dict[int, ExitCosts]`): By batch size, the median time of each part for a whole batch.
        spread (`dict[int, ExitCosts]`): Likewise, its interquartile range.
        plain (`dict[int, float]`): By batch size, the median milliseconds of the whole backbone without exits.
        dtype (`str`): Numbers that were computed with.
        threads (`int`): Threads that computed, on a CPU.
        machine (`str`): What it was measured on, in words.
    """

    macs: ExitCosts
    parameters: ExitCosts
    milliseconds: dict[int, ExitCosts]
    spread: dict[int, ExitCosts]
    plain: dict[int, float]
    dtype: str
    threads: int
    machine: str

    @property
    def batch_size(self) -> int:
        """The largest that was measured."""
        return max(self.milliseconds)

    def cumulative(self, exit_config: ExitConfig | None = None, batch_size: int | None = None) -> list[float]:
        """
        Milliseconds for one image of a full batch until an exit answers, as [`ExitCosts.cumulative`].

        Args:
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.
            batch_size (`int`, *optional*): One of those measured. Defaults to the largest.
        """
        size = batch_size or self.batch_size
        return [milliseconds / size for milliseconds in self._measured(size).cumulative(exit_config)]

    def expected_milliseconds(
        self,
        shares: Sequence[float],
        exit_config: ExitConfig | None = None,
        batch_size: int | None = None,
        refilled: bool = False,
    ) -> float:
        """
        Milliseconds for one image, computed from those of the parts and from how many images each exit answers.

        Images leave independently of each other, so how many of a batch are left is binomial. The time of a stage for
        that many is interpolated between the sizes measured.

        Args:
            shares (`Sequence[float]`): Share of the images that leave at each exit, and at last of those that leave
                at none, whatever answers them.
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.
            batch_size (`int`, *optional*): One of those measured. Defaults to the largest.
            refilled (`bool`, *optional*, defaults to `False`): Whether stages run full batches to the end, as in
                `predict_adaptive_stream`, rather than what is left of one, as in `predict_adaptive`.

        Raises:
            `ValueError`: if the batch size was not measured, or `shares` does not hold one share more than there are
                exits.
        """
        size = batch_size or self.batch_size
        self._measured(size)
        num_exits = len(self.macs.stages)
        if len(shares) != num_exits + 1 or not abs(sum(shares) - 1) < 1e-3:
            raise ValueError(
                f"`shares` is {list(shares)}; expected {num_exits + 1} shares of the images that add up to 1: one for "
                "each exit, and one for those that leave at none."
            )
        sizes = [0, *sorted(self.milliseconds)]
        total = 0.0
        for index in range(num_exits):
            times = [0.0]
            for measured in sizes[1:]:
                costs = self.milliseconds[measured]
                times.append(costs.stages[index] + costs.heads_that_run(exit_config)[index])
            left = min(1.0, max(0.0, 1 - sum(shares[:index])))
            if refilled:
                total += left * float(np.interp(size, sizes, times))
            else:
                counts = torch.arange(size + 1)
                chances = torch.distributions.Binomial(size, torch.tensor(left, dtype=torch.float64)).log_prob(counts)
                total += float(chances.exp().numpy() @ np.interp(counts.numpy(), sizes, times))
        return total / size

    def _measured(self, batch_size: int) -> ExitCosts:
        if batch_size not in self.milliseconds:
            raise ValueError(
                f"`batch_size` is {batch_size}, and {sorted(self.milliseconds)} were measured. Choose one of them, or "
                f"call `measure_costs(model, batch_size={batch_size})`."
            )
        return self.milliseconds[batch_size]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = asdict(self)
        for name in ("milliseconds", "spread", "plain"):
            values[name] = {str(size): value for size, value in values[name].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MeasuredCosts":
        """The inverse of [`MeasuredCosts.to_dict`]."""
        read = dict(values)
        for name in ("macs", "parameters"):
            read[name] = ExitCosts(**values[name])
        for name in ("milliseconds", "spread"):
            read[name] = {int(size): ExitCosts(**costs) for size, costs in values[name].items()}
        read["plain"] = {int(size): value for size, value in values["plain"].items()}
        return cls(**read)


def count_macs(model: "ScanForImageClassification") -> ExitCosts:
    """
    Counts the MACs of one image of `config.image_size` with PyTorch's flop counter: convolutions and matrix products,
    two flops each.

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

    def counted(part: Callable[..., Any], index: int, state: tuple[Any, ...]) -> tuple[int, Any]:
        with FlopCounterMode(display=False) as counter:
            output = part(index, state)
        return counter.get_total_flops() // 2, output

    state: tuple[Any, ...] = (_example(model, 1, torch.zeros),)
    stages: list[float] = []
    heads: list[float] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for index in range(model.num_exits):
                macs, state = counted(model.run_stage, index, state)
                stages.append(macs)
                heads.append(counted(model.run_exit, index, state)[0])
    finally:
        model.train(was_training)
    return ExitCosts(stages, heads)


def count_parameters(model: "ScanForImageClassification") -> ExitCosts:
    """
    Counts the parameters of each stage and head; one that several stages use, with the first of them. Of an exit head,
    those that it answers with: the projection of its feature for the hint is for training.
    """
    left = dict(model.backbone.named_parameters())
    stages: list[float] = []
    for stage in model.stages:
        used = [name for name in left if any(name == part or name.startswith(f"{part}.") for part in stage.parts)]
        stages.append(sum(left.pop(name).numel() for name in used))
    heads: list[float] = [
        sum(
            parameter.numel() for name, parameter in head.named_parameters() if not name.startswith("hint_projection.")
        )
        for head in model.exit_heads
    ]
    if not model.config.truncated:
        heads.append(sum(parameter.numel() for parameter in left.values()))
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
    Measures what each stage and each head costs on this machine, at the given batch size and at the powers of two
    below it, since a batch shrinks as images leave. The parts are timed on their way through the network, one after
    another as they really run, because each finds the caches as the part before left them; a head with the decision
    that its answer is for; the plain backbone in turns with them.

    Args:
        model ([`ScanForImageClassification`]): In evaluation mode, in the memory format that it is used in.
        batch_size (`int`, *optional*, defaults to 1): Images at a time.
        dtype (`torch.dtype`, *optional*): Numbers to compute with. Defaults to the model's.
        threads (`int`, *optional*): Threads to compute with, on a CPU. Defaults to PyTorch's current number.
        device (`torch.device` or `str`, *optional*): Where to measure. Defaults to the model's device. On another
            device, or with another `dtype`, a copy is measured, whose stages are not compiled.
        rounds (`int`, *optional*, defaults to 7): Times that each batch size is measured, for at least 50
            milliseconds each.

    Returns:
        [`MeasuredCosts`]. `model.exit_config = model.exit_config.update(costs=costs.to_dict())` has them saved with
        the model.

    Raises:
        `ValueError`: if the model is in training mode, or `batch_size`, `threads` or `rounds` are below 1.

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
    device = torch.device(device or model.device)
    elsewhere = device.type != model.device.type or device.index not in (None, model.device.index)
    if elsewhere or dtype not in (None, model.dtype):
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    sizes = sorted({batch_size, *(2**power for power in range(batch_size.bit_length()))})
    times: dict[int, list[list[float]]] = {size: [] for size in sizes}  # each part's and the backbone's, in seconds
    batches = {size: _example(model, size, torch.rand) for size in sizes}

    with benchmark.set_torch_threads(threads or torch.get_num_threads()), torch.inference_mode():
        repeats = {}
        for size, images in batches.items():
            _time_parts(model, images)  # warms up
            repeats[size] = math.ceil(0.05 / sum(_time_parts(model, images)))
        with logging.tqdm(total=rounds * len(sizes), desc="Measuring the exits' costs", leave=False) as bar:
            for _ in range(rounds):
                for size, images in batches.items():
                    times[size] += [_time_parts(model, images) for _ in range(repeats[size])]
                    bar.update()
        machine = describe_machine(device)
        threads = torch.get_num_threads()

    task = benchmark.TaskSpec("", "", num_threads=threads)
    measured = {
        size: [benchmark.Measurement(1, list(raw), task) for raw in zip(*passes)] for size, passes in times.items()
    }

    def of_parts(statistic: str) -> dict[int, ExitCosts]:
        values = {size: [1000 * getattr(part, statistic) for part in parts] for size, parts in measured.items()}
        return {size: ExitCosts(every[:-1:2], every[1:-1:2]) for size, every in values.items()}

    return MeasuredCosts(
        macs=count_macs(model),
        parameters=count_parameters(model),
        milliseconds=of_parts("median"),
        spread=of_parts("iqr"),
        plain={size: 1000 * parts[-1].median for size, parts in measured.items()},
        dtype=str(model.dtype).removeprefix("torch."),
        threads=threads,
        machine=machine,
    )


def _time_parts(model: "ScanForImageClassification", images: torch.Tensor) -> list[float]:
    """Seconds of each stage and its head, in their order, and of the plain network."""
    state: tuple[Any, ...] = (images,)
    seconds = []
    for index in range(model.num_exits):
        start = timer()
        state = model.run_stage(index, state)
        middle = timer()
        confidence = confidence_of(model.run_exit(index, state))
        int((confidence > 0.5).sum())  # what it takes to decide who leaves
        seconds += [middle - start, timer() - middle]
    start = timer()
    _plain(model)(images)
    return [*seconds, timer() - start]


def _plain(model: "ScanForImageClassification") -> Callable[[torch.Tensor], object]:
    """The network without early exits. Of a truncated one, nothing else is left than itself."""
    return model if model.config.truncated else model.backbone


def predicted_speedup(
    costs: MeasuredCosts,
    shares: Sequence[float],
    exit_config: ExitConfig | None = None,
    batch_size: int | None = None,
    refilled: bool = False,
) -> float:
    """
    The plain backbone's time over what adaptive inference should take: [`MeasuredCosts.expected_milliseconds`], whose
    arguments these are. Computed.

    Args:
        costs ([`MeasuredCosts`]): From [`measure_costs`].
        shares (`Sequence[float]`): Share of the images that leave at each exit, and at last of those at none.
        exit_config, batch_size, refilled: as there.
    """
    size = batch_size or costs.batch_size
    expected = costs.expected_milliseconds(shares, exit_config, size, refilled)
    return costs.plain[size] / size / expected


@dataclass(frozen=True)
class RealisedSpeedup:
    """
    What [`realised_speedup`] measured.

    Args:
        batch_size (`int`): Images at a time.
        refilled (`bool`): Whether by `predict_adaptive_stream`.
        plain (`float`): Milliseconds for one image, of the backbone without early exits.
        adaptive (`float`): The same, of adaptive inference with the model's own exit configuration.
        shares (`list[float]`): Share of the images that left at each exit, and at last of those that left at none.
    """

    batch_size: int
    refilled: bool
    plain: float
    adaptive: float
    shares: list[float]

    @property
    def speedup(self) -> float:
        """The plain time over the adaptive one."""
        return self.plain / self.adaptive


def realised_speedup(
    model: "ScanForImageClassification",
    images: torch.Tensor,
    batch_size: int = 1,
    plain: Callable[[torch.Tensor], object] | None = None,
    refilled: bool = False,
    rounds: int = 7,
) -> RealisedSpeedup:
    """
    Measures adaptive inference against the plain backbone, on real images, in turns, as medians over rounds.

    Args:
        model ([`ScanForImageClassification`]): In evaluation mode, with an exit configuration.
        images (`torch.Tensor` of shape `(n, num_channels, height, width)`): On the model's device, in its memory
            format; each round runs all of them.
        batch_size (`int`, *optional*, defaults to 1): Images at a time.
        plain (`Callable`, *optional*): What to compare with. Defaults to `model.backbone`.
        refilled (`bool`, *optional*, defaults to `False`): Whether to measure `predict_adaptive_stream` rather than
            `predict_adaptive`.
        rounds (`int`, *optional*, defaults to 7): Times that each is measured.

    Returns:
        [`RealisedSpeedup`]
    """
    batches = images.split(batch_size)
    network = plain or _plain(model)

    def answers() -> list[AdaptiveOutput]:
        if refilled:
            return list(model.predict_adaptive_stream(batches, batch_size=batch_size))
        return [model.predict_adaptive(batch) for batch in batches]

    def run_plain() -> None:
        with torch.inference_mode():
            for batch in batches:
                network(batch)

    seconds = interleaved_medians({"plain": run_plain, "adaptive": answers}, rounds=rounds, seconds_per_round=0.0)
    # What answers with the most confident of all exits has left at none of them.
    leaving = model.exit_config.update(fallback="ensemble")
    exits = torch.cat([model.predict_adaptive(batch, leaving).exit_index for batch in batches])
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
    Median seconds of several calls, measured in turns, so that a machine that slows down does so for all of them.

    Args:
        calls (`Mapping[str, Callable]`): What to time, by name.
        rounds (`int`, *optional*, defaults to 7): Times that each is measured.
        seconds_per_round (`float`, *optional*, defaults to 0.2): How long each measurement takes at least; a call is
            repeated to fill it.

    Returns:
        `dict[str, float]`: seconds for one call, by name.
    """

    def seconds(call: Callable[[], object], repeats: int) -> float:
        return timeit(call, number=repeats, timer=timer) / repeats

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
    """The machine in words, for figures that were measured on it."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def _example(model: "ScanForImageClassification", batch_size: int, fill: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Images as the model takes them: of its size and type, on its device and in its memory format."""
    size = model.config.image_size
    assert size is not None  # the network filled it in
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
    "ExitCosts",
    "MeasuredCosts",
    "RealisedSpeedup",
    "count_macs",
    "count_parameters",
    "describe_machine",
    "interleaved_medians",
    "measure_costs",
    "predicted_speedup",
    "realised_speedup",
]
