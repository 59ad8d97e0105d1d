# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Whether early exits pay, as a sentence: from costs alone, or from what exits answer on a split."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


# Speed-ups below the first are within the noise of times, and not worth a second network to look after; above the
# second, they are worth it.
NOTHING, SOMETHING = 1.02, 1.05
# Of a speed-up that no policy can exceed: below, the best case is not worth the work.
LEAST_BOUND = 1.1
# Points that may be lost on other images beyond those that were asked for: small splits are not exact.
MORE_LOST = 1.0
# A share of images that leaves at an exit only where nearly all are easy.
MOST_THAT_LEAVE = 0.9


@dataclass(frozen=True)
class Verdict:
    """
    Whether exits pay.

    Args:
        answer (`str`): `"pays"`, `"may pay"` or `"does not pay"`.
        reason (`str`): Why, as a sentence.
    """

    answer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.answer[0].upper()}{self.answer[1:]}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def break_even(cost: float, head: float) -> float:
    """
    Return the share of images that must leave at an exit, alone in a network, for it to save what its head costs.

    Args:
        cost (`float`): Of an answer there, the head included, as a share of the plain network's.
        head (`float`): Of the head alone, in the same unit.

    Returns:
        `float`: above 1 where no share does.

    Example:

    ```python
    >>> from hf_scan.workflows.verdict import break_even

    >>> break_even(cost=0.5, head=0.0), round(break_even(cost=0.5, head=0.1), 3)
    (0.0, 0.167)
    ```
    """
    # All pay the head, and those that leave save the rest: share * (1 + head - cost) = head.
    saved = 1 + head - cost
    return head / saved if saved > 0 else float("inf")


def verdict_of_costs(names: Sequence[str], costs: Sequence[float], heads: Sequence[float]) -> Verdict:
    """
    Judge by what exits cost alone.

    Args:
        names (`Sequence[str]`): The exits.
        costs (`Sequence[float]`): Of an answer at each, its own head included and no other, as shares.
        heads (`Sequence[float]`): Of each head.
    """
    bound = 1 / min(costs)
    shares = [break_even(cost, head) for cost, head in zip(costs, heads)]
    easiest = min(range(len(names)), key=shares.__getitem__)
    if bound < LEAST_BOUND:
        first = min(range(len(names)), key=costs.__getitem__)
        return Verdict(
            "does not pay",
            f"even if every image left at {names[first]}, the cheapest exit, the network would be {bound:.2f} times "
            "as fast.",
        )
    if shares[easiest] > MOST_THAT_LEAVE:
        return Verdict(
            "does not pay",
            f"heads are too dear: at {names[easiest]}, where it takes least, {shares[easiest]:.0%} of the images "
            "would have to leave to break even.",
        )
    return Verdict(
        "may pay",
        f"no policy is more than {bound:.2f} times as fast, and at {names[easiest]} it takes {shares[easiest]:.1%} of "
        "the images to break even. Whether so many leave there, only images tell: give `--data`.",
    )


def verdict_of_search(
    speedup: float,
    max_accuracy_drop: float,
    names: Sequence[str],
    accuracies: Sequence[float],
    alone: Sequence[float],
    heads: Sequence[float],
    deepest: float,
    chosen: Sequence[str],
    lost: float = 0.0,
    count: int = 0,
) -> Verdict:
    """
    Judge by what exits answer.

    Args:
        speedup (`float`): Expected on other images, by cross-fitting.
        max_accuracy_drop (`float`): Points that may be lost.
        names (`Sequence[str]`): The candidates.
        accuracies (`Sequence[float]`): Of each, in [0, 1].
        alone (`Sequence[float]`): The cost with this exit alone at the target, as a share of the plain network's.
        heads (`Sequence[float]`): The cost of each head, as such a share.
        deepest (`float`): The deepest exit's accuracy.
        chosen (`Sequence[str]`): The exits of the choice.
        lost (`float`, *optional*, defaults to 0.0): Points lost on other images, by cross-fitting.
        count (`int`, *optional*, defaults to 0): Images that were searched on.
    """
    best = min(range(len(names)), key=alone.__getitem__)
    kept = f"at most {max_accuracy_drop:g} points lost"
    if chosen and speedup >= NOTHING and lost > max_accuracy_drop + MORE_LOST:
        return Verdict(
            "may pay",
            f"{speedup:.2f} times as fast as the plain network with exits at {', '.join(chosen)}, but {lost:.1f} "
            f"points are lost on images that did not choose the thresholds, where {kept.removesuffix(' lost')} were "
            f"asked for. More images to search on than {count:,} bring the two closer.",
        )
    if chosen and speedup >= SOMETHING:
        where = ", ".join(chosen)
        return Verdict("pays", f"{speedup:.2f} times as fast as the plain network with exits at {where} and {kept}.")
    if chosen and speedup >= NOTHING:
        return Verdict(
            "may pay",
            f"{speedup:.2f} times as fast with {kept}, which is hardly more than times vary. More training of the "
            "heads (`--finetune`) or a larger drop would show.",
        )
    if alone[best] + heads[best] < 1 - (SOMETHING - 1):
        fault = f"its head is too dear: {heads[best]:.1%} of the network, for what the exit saves"
    else:
        lost = 100 * (deepest - accuracies[best])
        fault = f"it is too weak: alone it is {lost:.1f} points less accurate than the network's own answer"
    return Verdict(
        "does not pay", f"{kept} leaves {speedup:.2f} times the speed. The best exit is {names[best]}, and {fault}."
    )


def verdict_of_run(
    speedup: float,
    lost: float,
    accuracies: Sequence[float],
    shares: Sequence[float],
    costs: Sequence[float],
    heads: Sequence[float],
) -> Verdict:
    """
    Judge a trained network by its measured speed-up, and say which exit holds it back.

    Args:
        speedup (`float`): Measured, over the plain network.
        lost (`float`): Points of accuracy lost against the deepest exit.
        accuracies (`Sequence[float]`): Of each exit, the deepest last, in [0, 1].
        shares (`Sequence[float]`): Of the images that leave at each early exit, in [0, 1].
        costs (`Sequence[float]`): Of an answer at each early exit, as a share of the plain network's.
        heads (`Sequence[float]`): Of each early exit's head, in that unit; 0 where the head does not run.

    Example:

    ```python
    >>> from hf_scan.workflows.verdict import verdict_of_run

    >>> verdict = verdict_of_run(0.97, 0.1, [0.5, 0.9], [0.02], [0.4], [0.05])
    >>> verdict.answer, "its head costs 5.0% of the network" in verdict.reason
    ('does not pay', True)
    ```
    """
    figures = f"{speedup:.2f} times the speed of the plain network, {lost:.1f} points lost"
    if speedup >= SOMETHING:
        return Verdict("pays", f"{figures}.")
    best = max(range(len(shares)), key=lambda index: accuracies[index])
    gap = 100 * (accuracies[-1] - accuracies[best])
    weak = f"The best, exit {best}, is {gap:.1f} points less accurate than the deepest."
    if not any(heads):
        return Verdict("does not pay", f"all exits are off, because none is accurate enough for the target. {weak}")
    # Everyone that comes by pays the head, and those that leave save the rest of the network.
    passing = [1 - sum(shares[:index]) for index in range(len(shares))]
    gains = [shares[k] * (1 - costs[k]) - passing[k] * heads[k] for k in range(len(shares))]
    running = [index for index, head in enumerate(heads) if head > 0]
    worst = min(running, key=gains.__getitem__)
    if gains[worst] < 0:
        reason = (
            f"Exit {worst} is too dear for what leaves there: its head costs {heads[worst]:.1%} of the network, and "
            f"{shares[worst]:.0%} of the images leave."
        )
    else:
        reason = f"{sum(shares):.0%} of the images leave early, because the exits are too weak. {weak}"
    return Verdict("may pay" if speedup >= NOTHING else "does not pay", f"{figures}. {reason}")


__all__ = ["Verdict", "break_even", "verdict_of_costs", "verdict_of_run", "verdict_of_search"]
