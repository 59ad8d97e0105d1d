# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The figures of a network as one dictionary, which `metrics.json` holds, and as one table, which people read."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..costs.measure import count_macs
from ..costs.values import MeasuredCosts, RealisedSpeedup, predicted_speedup
from ..model.exit_rule import last_answer


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


def exit_report(
    model: "ScanForImageClassification",
    scores: Mapping[str, float],
    speedups: Sequence[RealisedSpeedup] = (),
    plain_accuracy: float | None = None,
) -> dict[str, Any]:
    """
    Puts together what is known of a network's exits. A figure that was not measured is not in it.

    Args:
        model ([`ScanForImageClassification`]): With its exit configuration; what its parts cost is read there.
        scores (`Mapping[str, float]`): What [`~hf_scan.metrics.ScanAccuracy`] gave on the test split.
        speedups (`Sequence[RealisedSpeedup]`, *optional*): From [`~hf_scan.costs.realised_speedup`].
        plain_accuracy (`float`, *optional*): Test accuracy of the plain backbone, trained with the same recipe.

    Returns:
        `dict[str, Any]`: `rows` (one per exit, then the ensemble, the adaptive answer and the plain backbone) and
        `speedup`.
    """
    macs = count_macs(model)
    adaptive = model.exit_config.thresholds is not None and "adaptive_accuracy" in scores
    cumulative = macs.cumulative(model.exit_config if adaptive else None)
    thresholds = model.exit_config.resolve(model.num_exits) if adaptive else None
    costs = MeasuredCosts.from_dict(model.exit_config.costs) if model.exit_config.costs is not None else None
    columns = [measured for measured in speedups if not measured.refilled]
    sizes: list[int] = []
    if costs is not None:  # for the largest batch and for one image, where it was not run against the plain network
        wanted = {measured.batch_size for measured in columns} or {1, costs.batch_size}
        sizes = [size for size in sorted(wanted) if size in costs.milliseconds and size in costs.plain]
    milliseconds = {
        str(size): costs.cumulative(model.exit_config if adaptive else None, size)
        for size in sizes
        if costs is not None
    }

    rows: list[dict[str, Any]] = []
    last = last_answer(model.exit_config.fallback)
    for index in range(model.num_exits + 1):
        ensemble = index == model.num_exits
        key = last if ensemble else f"exit_{index}"
        row: dict[str, Any] = {
            "name": last.replace("_", " ") if ensemble else f"exit {index} ({model.stages[index].name})",
            "accuracy": scores[f"{key}_accuracy"],
            "macs": cumulative[index],
        }
        if thresholds is not None:
            row["threshold"] = None if ensemble else thresholds[index]
            row["share"] = scores[f"{key}_share"]
        row["milliseconds"] = {size: values[index] for size, values in milliseconds.items()}
        rows.append(row)

    plain: dict[str, Any] = {"name": "plain backbone", "macs": macs.plain}
    # What was measured in turns with the adaptive answers, or else along with the exits.
    plain["milliseconds"] = {str(size): costs.plain[size] / size for size in sizes if costs is not None} | {
        str(measured.batch_size): measured.plain for measured in columns
    }
    if plain_accuracy is not None:
        plain["accuracy"] = plain_accuracy
    speedup: dict[str, Any] = {}
    if adaptive:
        mean_macs = scores["mean_cost"] * macs.plain
        rows.append(
            {
                "name": "adaptive",
                "accuracy": scores["adaptive_accuracy"],
                "macs": mean_macs,
                "milliseconds": {str(measured.batch_size): measured.adaptive for measured in columns},
            }
        )
        speedup["predicted from MACs"] = macs.plain / mean_macs
        for measured in speedups:
            size, refilled = measured.batch_size, measured.refilled
            batch = f"batch {size}, refilled" if refilled else f"batch {size}"
            if costs is not None and size in costs.milliseconds:
                predicted = predicted_speedup(costs, measured.shares, model.exit_config, size, refilled)
                speedup[f"predicted from milliseconds, {batch}"] = predicted
            speedup[f"realised, {batch}"] = measured.speedup
    rows.append(plain)
    return {"rows": rows, "speedup": speedup}


def exit_table(report: Mapping[str, Any]) -> str:
    """
    The table of a report, in Markdown that is aligned for the terminal too.

    Args:
        report (`Mapping[str, Any]`): From [`exit_report`].
    """
    rows = report["rows"]
    plain_macs = rows[-1]["macs"]
    batch_sizes = list(rows[-1]["milliseconds"])
    head = ["", "accuracy", "threshold", "share", "MACs", "x plain", *(f"ms, batch {b}" for b in batch_sizes)]
    table = [head]
    for row in rows:
        threshold = row.get("threshold")
        table.append(
            [
                row["name"],
                f"{row['accuracy']:.2%}" if "accuracy" in row else "",
                f"{threshold:.3f}" if threshold is not None else "",
                f"{row['share']:.1%}" if "share" in row else "",
                f"{row['macs'] / 1e6:.1f} M",
                f"{row['macs'] / plain_macs:.3f}",
                *(f"{row['milliseconds'][size]:.3f}" if size in row["milliseconds"] else "" for size in batch_sizes),
            ]
        )
    # A column that says nothing in any row is left out.
    kept = [index for index in range(len(head)) if index == 0 or any(line[index] for line in table[1:])]
    widths = [max(len(line[index]) for line in table) for index in kept]
    lines = [
        "| " + " | ".join(_aligned(line[index], width, index) for index, width in zip(kept, widths)) + " |"
        for line in table
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in zip(kept, widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _aligned(text: str, width: int, index: int) -> str:
    return text.rjust(width) if index else text.ljust(width)


def speedup_lines(report: Mapping[str, Any]) -> list[str]:
    """The speed-ups of a report, a line each."""
    return [f"speed-up {name}: {value:.2f}x" for name, value in report["speedup"].items()]
