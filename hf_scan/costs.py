# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What each exit costs: multiplications counted, milliseconds measured."""

import math
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from timeit import timeit
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .adaptive import ExitConfig


if TYPE_CHECKING:
    from .modeling_scan import ScanForImageClassification


@dataclass(frozen=True)
class ExitCosts:
    """
    Multiply-accumulate operations (MACs) of one image, part by part. Computed from the shapes, not measured.

    Args:
        stages (`list[int]`): One per stage.
        heads (`list[int]`): One per exit; the last is the backbone's own head.
    """

    stages: list[int]
    heads: list[int]

    @property
    def plain(self) -> int:
        """MACs of the backbone without early exits."""
        return sum(self.stages) + self.heads[-1]

    def cumulative(self, exit_config: ExitConfig | None = None) -> list[int]:
        """
        MACs of all that has run when an exit answers, earlier heads included.

        Args:
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.

        Returns:
            `list[int]`: one per exit, and a last one for the ensemble, whose mean costs nothing to speak of.
        """
        num_exits = len(self.stages)
        total, costs = 0, []
        for index in range(num_exits):
            total += self.stages[index]
            if exit_config is None or exit_config.runs_head(index, num_exits):
                total += self.heads[index]
            costs.append(total)
        return [*costs, total]

    def relative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """The cumulative costs as shares of the plain backbone's."""
        return [cost / self.plain for cost in self.cumulative(exit_config)]


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

    size = model.config.image_size
    assert size is not None  # the network filled it in
    state: tuple[Any, ...] = (
        torch.zeros(1, model.config.num_channels, size, size, device=model.device, dtype=model.dtype),
    )
    stages, heads = [], []
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


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int = 7, seconds_per_round: float = 0.2
) -> dict[str, float]:
    """
    Median seconds of several calls, measured in turns, so that a machine that slows down does so for all of them.

    Args:
        calls (`Mapping[str, Callable]`): What to time, by name. On an accelerator, a call has to wait for it.
        rounds (`int`, *optional*, defaults to 7): Times that each is measured.
        seconds_per_round (`float`, *optional*, defaults to 0.2): How long each measurement takes at least; a call is
            repeated to fill it.

    Returns:
        `dict[str, float]`: seconds for one call, by name.
    """
    repeats = {}
    for name, call in calls.items():
        timeit(call, number=2)  # warms up
        repeats[name] = max(1, round(seconds_per_round * 2 / timeit(call, number=2)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timeit(call, number=repeats[name]) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass(frozen=True)
class MeasuredTimes:
    """
    Milliseconds for one image, measured.

    Args:
        batch_size (`int`): Images at a time.
        plain (`float`): The backbone without early exits.
        exits (`list[float]`): Being answered at each exit, earlier heads included; the ensemble is last.
        adaptive (`float`): `predict_adaptive`, with the model's own exit configuration.
        shares (`list[float]`): Share of the measured images that each exit, and the ensemble, answered.
    """

    batch_size: int
    plain: float
    exits: list[float]
    adaptive: float
    shares: list[float]

    @property
    def predicted_speedup(self) -> float:
        """The plain time over the exits' times, weighted by how many images they answer."""
        return self.plain / sum(share * time for share, time in zip(self.shares, self.exits))

    @property
    def realised_speedup(self) -> float:
        """The plain time over that of `predict_adaptive`, measured in turns on the same images."""
        return self.plain / self.adaptive


def measure_times(
    model: "ScanForImageClassification",
    images: torch.Tensor,
    batch_size: int,
    plain: Callable[[torch.Tensor], object] | None = None,
    rounds: int = 7,
) -> MeasuredTimes:
    """
    Measures a network with thresholds against its plain backbone, on real images, interleaved, medians over rounds.

    Args:
        model ([`ScanForImageClassification`]): In eval mode, with an exit configuration.
        images (`torch.Tensor` of shape `(n, num_channels, height, width)`): On the model's device, in its memory
            format; each round runs all of them.
        batch_size (`int`): Images at a time.
        plain (`Callable`, *optional*): What to compare with. Defaults to `model.backbone`.
        rounds (`int`, *optional*, defaults to 7): Times that each is measured.

    Returns:
        [`MeasuredTimes`]
    """
    batches = images.split(batch_size)
    plain = plain or model.backbone
    num_exits = model.num_exits
    own = model.exit_config.resolve(num_exits)

    def leaving_at(index: int) -> ExitConfig:
        # Switched-off exits stay off, heads that run for the ensemble run,
        # and a decision that is made is made: above the largest number below 1 there is no confidence.
        never = math.nextafter(1.0, 0.0)
        passed = [threshold if threshold is None or threshold == 1 else never for threshold in own]
        return model.exit_config.update(thresholds=[*passed[:index], 0.0, *passed[index + 1 :]][:num_exits])

    def over(call: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for batch in batches:
                    call(batch)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)

        return run

    calls: dict[str, Callable[[], object]] = {"plain": over(plain), "adaptive": over(model.predict_adaptive)}
    for index in range(num_exits + 1):
        calls[str(index)] = over(partial(model.predict_adaptive, exit_config=leaving_at(index)))
    seconds = interleaved_medians(calls, rounds=rounds, seconds_per_round=0.0)
    per_image = {name: 1000 * value / len(images) for name, value in seconds.items()}

    answers = torch.cat([model.predict_adaptive(batch).exit_index for batch in batches])
    shares = answers.bincount(minlength=num_exits + 1) / len(images)
    return MeasuredTimes(
        batch_size=batch_size,
        plain=per_image["plain"],
        exits=[per_image[str(index)] for index in range(num_exits + 1)],
        adaptive=per_image["adaptive"],
        shares=shares.tolist(),
    )


def describe_machine(device: torch.device | str = "cpu") -> str:
    """The machine in words, for figures that were measured on it."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    return f"{cpu}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
