# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Collect the figures of a network in a dictionary, for `metrics.json`, and in a table, for people."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..costs.measure import count_macs
from ..costs.values import ExitCosts, MeasuredCosts, RealisedSpeedup, predicted_speedup
from ..model.exit_config import ExitConfig
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
    Collect the figures of a network's exits. Figures that were not measured are left out.

    Args:
        model ([`ScanForImageClassification`]): The network, with its exit configuration, which holds measured costs.
        scores (`Mapping[str, float]`): Scores of [`~hf_scan.metrics.ScanAccuracy`] on the test split.
        speedups (`Sequence[RealisedSpeedup]`, *optional*): Results of [`~hf_scan.costs.realised_speedup`].
        plain_accuracy (`float`, *optional*): Test accuracy of the plain backbone, trained with the same recipe.

    Returns:
        `dict[str, Any]`: `rows` (one per exit, then the ensemble, the adaptive answer and the plain backbone) and
        `speedup`.
    """
    macs = count_macs(model)
    costs = MeasuredCosts.from_dict(model.exit_config.costs) if model.exit_config.costs is not None else None
    adaptive = model.exit_config.thresholds is not None and "adaptive_accuracy" in scores
    exit_config = model.exit_config if adaptive else None
    interleaved = {str(measured.batch_size): measured for measured in speedups if not measured.refilled}
    milliseconds, plain_milliseconds = _milliseconds(costs, exit_config, interleaved)
    rows = _exit_rows(model, scores, exit_config, macs, milliseconds)
    speedup: dict[str, float] = {}
    if adaptive:
        mean_macs = scores["mean_cost"] * macs.plain
        rows.append(
            {
                "name": "adaptive",
                "accuracy": scores["adaptive_accuracy"],
                "macs": mean_macs,
                "milliseconds": {size: measured.adaptive for size, measured in interleaved.items()},
            }
        )
        speedup["predicted from MACs"] = macs.plain / mean_macs
        speedup |= _speedups(costs, speedups, model.exit_config)
    plain = {"name": "plain backbone", "macs": macs.plain, "milliseconds": plain_milliseconds}
    rows.append(plain if plain_accuracy is None else {**plain, "accuracy": plain_accuracy})
    return {"rows": rows, "speedup": speedup}


def _milliseconds(
    costs: MeasuredCosts | None, exit_config: ExitConfig | None, interleaved: Mapping[str, RealisedSpeedup]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """
    Return the milliseconds to report, by batch size: of each exit and the fallback, and of the plain backbone, which
    was measured in turns with the adaptive answers or else with the exits.
    """
    plain = {size: measured.plain for size, measured in interleaved.items()}
    if costs is None:
        return {}, plain
    # The sizes of the adaptive answers, or else the largest batch and a single image.
    wanted = {measured.batch_size for measured in interleaved.values()} or {1, costs.batch_size}
    sizes = [size for size in sorted(wanted) if size in costs.milliseconds and size in costs.plain]
    exits = {str(size): costs.cumulative(exit_config, size) for size in sizes}
    return exits, {str(size): costs.plain[size] / size for size in sizes} | plain


def _exit_rows(
    model: "ScanForImageClassification",
    scores: Mapping[str, float],
    exit_config: ExitConfig | None,
    macs: ExitCosts,
    milliseconds: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """Return the rows of the exits and of the fallback."""
    thresholds = None if exit_config is None else exit_config.resolve(model.num_exits)
    cumulative = macs.cumulative(exit_config)
    last = last_answer(model.exit_config.fallback)
    rows = []
    for index in range(model.num_exits + 1):
        is_last = index == model.num_exits
        key = last if is_last else f"exit_{index}"
        row: dict[str, Any] = {
            "name": last.replace("_", " ") if is_last else f"exit {index} ({model.stages[index].name})",
            "accuracy": scores[f"{key}_accuracy"],
            "macs": cumulative[index],
        }
        if thresholds is not None:
            row["threshold"] = None if is_last else thresholds[index]
            row["share"] = scores[f"{key}_share"]
        row["milliseconds"] = {size: values[index] for size, values in milliseconds.items()}
        rows.append(row)
    return rows


def _speedups(
    costs: MeasuredCosts | None, speedups: Sequence[RealisedSpeedup], exit_config: ExitConfig
) -> dict[str, float]:
    """Return the measured speed-ups by name, each after the one that is predicted where its parts were measured."""
    found = {}
    for measured in speedups:
        size, refilled = measured.batch_size, measured.refilled
        batch = f"batch {size}, refilled" if refilled else f"batch {size}"
        if costs is not None and size in costs.milliseconds:
            predicted = predicted_speedup(costs, measured.shares, exit_config, size, refilled)
            found[f"predicted from milliseconds, {batch}"] = predicted
        found[f"realised, {batch}"] = measured.speedup
    return found


def exit_table(report: Mapping[str, Any]) -> str:
    """
    Return the table of a report, in Markdown that is aligned for the terminal too.

    Args:
        report (`Mapping[str, Any]`): A result of [`exit_report`].
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
    # Columns that are empty in all rows are left out.
    kept = [index for index in range(len(head)) if index == 0 or any(line[index] for line in table[1:])]
    return markdown_table([[line[index] for index in kept] for line in table])


def costs_table(costs: MeasuredCosts) -> str:
    """
    Return the table of what each part costs, in Markdown: MACs, parameters, and for each batch size the median
    milliseconds of a whole batch with their interquartile range.

    Args:
        costs ([`~hf_scan.costs.MeasuredCosts`]): From [`~hf_scan.measure_costs`].
    """
    sizes = sorted(costs.milliseconds)
    table = [["", "MACs", "parameters", *(f"ms, batch {size}" for size in sizes)]]
    for index in range(len(costs.macs.stages)):
        for kind in ("stages", "heads"):
            row = [f"{kind[:-1]} {index}"]
            row += [f"{getattr(counted, kind)[index] / 1e6:.2f} M" for counted in (costs.macs, costs.parameters)]
            for size in sizes:
                milliseconds, spread = costs.milliseconds[size], costs.spread[size]
                row.append(f"{getattr(milliseconds, kind)[index]:.3f} ± {getattr(spread, kind)[index]:.3f}")
            table.append(row)
    plain = ["plain backbone", f"{costs.macs.plain / 1e6:.2f} M", f"{costs.parameters.plain / 1e6:.2f} M"]
    for size in sizes:
        spread_of_plain = f" ± {costs.plain_spread[size]:.3f}" if size in costs.plain_spread else ""
        plain.append(f"{costs.plain[size]:.3f}{spread_of_plain}")
    return markdown_table([*table, plain])


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which is the head, as a table that is aligned for the terminal too."""
    widths = [max(len(line[index]) for line in table) for index in range(len(table[0]))]
    lines = [
        "| " + " | ".join(_aligned(cell, width, index) for index, (cell, width) in enumerate(zip(line, widths))) + " |"
        for line in table
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if index else "-") for index, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _aligned(text: str, width: int, index: int) -> str:
    return text.rjust(width) if index else text.ljust(width)


def shares_line(report: Mapping[str, Any], width: int = 60) -> str:
    """
    Return where images leave, as a bar of one line with a letter for each exit, and a line that explains it.

    Args:
        report (`Mapping[str, Any]`): A result of [`exit_report`], of a network with thresholds.
        width (`int`, *optional*, defaults to 60): Characters of the bar.

    Example:

    ```python
    >>> from hf_scan.reporting.report import shares_line

    >>> rows = [{"name": "exit 0 (layer1)", "share": 0.75}, {"name": "ensemble", "share": 0.25}]
    >>> print(shares_line({"rows": rows}, width=8))
    images leave at  000000ee
                     exit 0 (layer1) 75.0%, ensemble 25.0%
    ```
    """
    rows = [row for row in report["rows"] if row.get("share")]
    ends = [round(width * sum(row["share"] for row in rows[: index + 1])) for index in range(len(rows))]
    letters = [row["name"].removeprefix("exit ")[0] for row in rows]
    bar = "".join(letter * (end - start) for letter, start, end in zip(letters, [0, *ends], ends))
    title = "images leave at  "
    key = ", ".join(f"{row['name']} {row['share']:.1%}" for row in rows)
    return f"{title}{bar}\n{' ' * len(title)}{key}"


def speedup_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the speed-ups of a report, one a line."""
    return [f"speed-up {name}: {value:.2f}x" for name, value in report["speedup"].items()]
