# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Whether exits could pay on a network, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..model.configuration_scan import ScanConfig
from ..model.modeling_scan import ScanForImageClassification
from ..reporting.report import markdown_table
from .candidates import candidates_of, left_out, network_of, with_candidates
from .part_costs import costs_of_parts
from .torchvision_source import torchvision_name
from .verdict import Verdict, break_even, verdict_of_costs


@dataclass(frozen=True)
class Advice:
    """
    What exits of a network cost.

    Args:
        network (`str`): The network's name.
        rows (`list[dict[str, Any]]`): A row for each place where an exit could stand: `name`, `cost` (of an answer
            there, as a share of the plain network's, its own head included), `head`, `break_even` (the share of images
            that must leave there for it to pay, with no other exit) and `bound` (the speed-up if all leave there).
        bound (`float`): The speed-up that no thresholds exceed.
        unit (`str`): What costs were counted or measured in.
        verdict ([`~hf_scan.workflows.verdict.Verdict`]): Whether exits may pay.
        dropped (`dict[str, str]`, *optional*): Modules after which no exit could stand, or none is worth a look, with
            the reason.
    """

    network: str
    rows: list[dict[str, Any]]
    bound: float
    unit: str
    verdict: Verdict
    dropped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        names = ("network", "rows", "bound", "unit", "dropped")
        return {**{name: getattr(self, name) for name in names}, "verdict": self.verdict.to_dict()}

    def __str__(self) -> str:
        head = ["exit", "cost", "head", "break even", "bound"]
        lines = [
            [
                row["name"],
                f"{row['cost']:.3f}",
                f"{row['head']:.3f}",
                f"{row['break_even']:.1%}" if row["break_even"] <= 1 else "never",
                f"{row['bound']:.2f}x",
            ]
            for row in self.rows
        ]
        return "\n".join(
            [
                markdown_table([head, *lines]),
                *left_out(self.dropped),
                f"Costs as shares of the plain network's: {self.unit}. `break even`: the share of images that must "
                "leave there for the exit to pay.",
                str(self.verdict),
            ]
        )


def advise(
    model: str | ScanForImageClassification,
    *,
    max_exits: int = 4,
    exit_points: Sequence[str] | None = None,
    runtime: str = "pytorch",
    batch_size: int = 1,
    **config: Any,
) -> Advice:
    """
    Tell from costs alone, without weights or images, what exits could bring: how much an answer at each block costs,
    which share of the images has to leave there for the exit to pay, and the speed-up that nothing exceeds.

    Args:
        model (`str` or [`ScanForImageClassification`]): A name in timm's registry, one of torchvision as
            `"torchvision/resnet18"`, or a network.
        max_exits (`int`, *optional*, defaults to 4): How many exits there will be, which share the budget of heads.
        exit_points (`Sequence[str]`, *optional*): Where exits could stand. Defaults to every block.
        runtime (`str`, *optional*, defaults to `"pytorch"`): Where milliseconds are measured, `"pytorch"` or `"onnx"`;
            `"macs"` counts instead.
        batch_size (`int`, *optional*, defaults to 1): Images at a time.
        config: For a name, more arguments of [`ScanConfig`], such as `image_size` or `num_labels`.

    Returns:
        [`Advice`]: a table when printed.

    Raises:
        `ValueError`: if timm or torchvision does not know the name, the network has no place for an exit, or an
            argument is out of range.

    Example:

    ```python
    >>> from hf_scan import advise

    >>> advice = advise("cifar_resnet20", exit_points=["layer1", "layer2"], runtime="macs", num_labels=10)
    >>> print(advice.verdict)
    May pay: no policy is more than ... times as fast, and at layer1 it takes ...
    ```
    """
    if max_exits < 1:
        raise ValueError(f"`max_exits` is {max_exits}; expected a whole number of at least 1.")
    if isinstance(model, str):
        settings = {"num_labels": 1000, **config}
        if (name := torchvision_name(model)) is not None:
            settings = {"backbone_source": "torchvision", "image_size": 224, **settings}
        model = ScanForImageClassification(ScanConfig(backbone=name or model, **settings))
    elif config:
        raise ValueError(f"{sorted(config)} are for a network that is given by name; this one is as it is.")
    points = None if exit_points is None else list(exit_points)
    wide = network_of(with_candidates(model.config, max_exits, points, model.backbone), model.backbone).eval()
    costs = costs_of_parts(wide, runtime, batch_size)
    stages, heads = np.cumsum(costs.shares.stages), costs.shares.heads
    rows = [
        {
            "name": stage.name,
            "cost": float(before + head),
            "head": float(head),
            "break_even": break_even(float(before + head), float(head)),
            "bound": float(1 / (before + head)),
        }
        for stage, before, head in zip(wide.stages[:-1], stages, heads)
    ]
    names = [row["name"] for row in rows]
    verdict = verdict_of_costs(names, [row["cost"] for row in rows], [row["head"] for row in rows])
    bound = max(row["bound"] for row in rows)
    dropped = candidates_of(model).dropped if points is None else {}
    return Advice(model.config.backbone, rows, bound, costs.unit, verdict, dropped)


__all__ = ["Advice", "advise"]
