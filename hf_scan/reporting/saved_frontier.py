# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Keep a frontier of thresholds beside a checkpoint, to choose from later: [`SavedFrontier`]."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from ..costs.cost_model import CostModel
from ..model.exit_config import ExitConfig


if TYPE_CHECKING:
    from ..calibration.exit_table import ExitTable
    from ..calibration.frontier import Frontier


FRONTIER_NAME = "frontier.json"
KEPT_POLICIES = 200


@dataclass
class SavedFrontier:
    """
    Policies of which none dominates another, as they lie beside a checkpoint in `frontier.json`.

    Args:
        accuracy (`list[float]`): Of each policy, in [0, 1], on the images that were searched.
        cost (`list[float]`): Mean cost of an image there, as a share of the plain network's; ascending.
        thresholds (`list[list[float | None]]`): As an [`ExitConfig`] holds them.
        deepest_accuracy (`float`): Accuracy of the deepest exit on the same images.
        unit (`str`): What the cost counts.
        split (`str`): Name of the images' split.
        samples (`int`): How many images these are.
        fallback (`str`): What answers an image that leaves nowhere: [`ExitConfig`].
        criterion (`str`): The score that thresholds are compared with.
        temperatures (`list[float]`, *optional*): By which logits are divided before they are scored.

    Raises:
        `ValueError`: if there is no policy, or lists are not of one length.
    """

    accuracy: list[float]
    cost: list[float]
    thresholds: list[list[float | None]]
    deepest_accuracy: float
    unit: str
    split: str
    samples: int
    fallback: str = "ensemble"
    criterion: str = "confidence"
    temperatures: list[float] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.accuracy), len(self.cost), len(self.thresholds)}
        if len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"A frontier has {len(self.accuracy)} accuracies, {len(self.cost)} costs and {len(self.thresholds)} "
                "policies; expected one of each for every policy, and at least one."
            )

    @classmethod
    def of(
        cls, table: "ExitTable", exit_config: ExitConfig, cost_model: CostModel, frontier: "Frontier | None" = None
    ) -> "SavedFrontier":
        """
        Find the frontier of a network on images that are scored already.

        Args:
            table ([`~hf_scan.calibration.ExitTable`]): Every exit's logits on a split that training did not see.
            exit_config ([`ExitConfig`]): Criterion, temperatures and fallback.
            cost_model ([`~hf_scan.costs.CostModel`]): The cost of an answer.
            frontier ([`~hf_scan.calibration.Frontier`], *optional*): That of the table, where it is known already.

        Returns:
            [`SavedFrontier`]: of at most 200 policies, spread evenly.
        """
        from ..calibration.exit_frontier import exit_frontier
        from ..calibration.frontier import as_thresholds

        found = frontier
        if found is None:
            found = exit_frontier(table, exit_config, cost_model.cumulative, polish=False)
        rows = np.unique(np.linspace(0, len(found) - 1, min(KEPT_POLICIES, len(found)), dtype=int))
        return cls(
            accuracy=found.accuracy[rows].tolist(),
            cost=(found.cost[rows] / cost_model.plain_image).tolist(),
            thresholds=[as_thresholds(found.thresholds[row]) for row in rows],
            deepest_accuracy=table.baseline_accuracy,
            unit=cost_model.unit,
            split=table.split,
            samples=len(table),
            fallback=exit_config.fallback,
            criterion=str(exit_config.criterion),
            temperatures=exit_config.temperatures,
        )

    def __len__(self) -> int:
        return len(self.cost)

    def cheapest(self, max_accuracy_drop: float) -> int:
        """
        Return the cheapest policy that loses no more than some points against the deepest exit, on the images that
        were searched; the most accurate one if none does.

        Args:
            max_accuracy_drop (`float`): Points of accuracy, of 100.

        Example:

        ```python
        >>> from hf_scan.reporting.saved_frontier import SavedFrontier

        >>> policies = [[0.2, 0.0], [0.6, 0.0], [0.9, 0.0]]
        >>> frontier = SavedFrontier([0.80, 0.89, 0.90], [0.4, 0.5, 0.8], policies, 0.90, "MACs", "search", 500)
        >>> frontier.cheapest(max_accuracy_drop=1.0)
        1
        ```
        """
        enough = np.asarray(self.accuracy) >= self.deepest_accuracy - max_accuracy_drop / 100 - 1e-9
        return int(np.argmax(enough)) if enough.any() else int(np.argmax(self.accuracy))

    def exit_config(self, policy: int) -> ExitConfig:
        """Return a policy as the rule that a network answers by."""
        return ExitConfig(
            thresholds=list(self.thresholds[policy]),
            criterion=self.criterion,
            temperatures=self.temperatures,
            fallback=self.fallback,  # type: ignore[arg-type]
        )

    def save(self, folder: str | Path) -> None:
        """Write `frontier.json` into a folder."""
        text = json.dumps(asdict(self), indent=1)
        Path(folder, FRONTIER_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SavedFrontier":
        """
        Read a file that [`~SavedFrontier.save`] wrote.

        Raises:
            `ValueError`: if it holds anything else.
            `FileNotFoundError`: if there is no file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            frontier = cls(**found)
            _check_numbers([frontier.deepest_accuracy, frontier.samples])
            for policy in range(len(frontier)):
                _check_numbers([frontier.accuracy[policy], frontier.cost[policy]])
                frontier.exit_config(policy)
        except FileNotFoundError:
            raise
        except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} holds no frontier of thresholds ({reason}). Delete it, or calibrate anew."
            ) from error
        return frontier


def _check_numbers(numbers: Sequence[Any]) -> None:
    if not all(isinstance(number, (int, float)) and np.isfinite(number) for number in numbers):
        raise ValueError(f"expected numbers, found {list(numbers)}")


__all__ = ["FRONTIER_NAME", "SavedFrontier"]
