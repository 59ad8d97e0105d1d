# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Pieces of the demo's page, as HTML and SVG in the colours of its theme, light or dark."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ..reporting.saved_frontier import SavedFrontier
from ..reporting.style import CHOSEN, colour_of
from .network import ExitView, ImageView


CSS = """
.scan {font-size: 15px; line-height: 1.45; color: var(--body-text-color)}
#image img, #small img {width: 100%; height: 100%; object-fit: contain}
#gallery .grid-wrap {max-height: none}
.scan .quiet, .scan.quiet {color: color-mix(in srgb, var(--body-text-color) 70%, transparent)}
.scan .verdict {font-size: 26px; font-weight: 650; line-height: 1.25; margin: 0 0 2px}
.scan .exits {display: grid; gap: 10px; margin: 14px 0}
.scan .exit {border: 1px solid var(--border-color-primary); border-left-width: 5px; border-radius: 8px;
  padding: 8px 12px; background: var(--background-fill-secondary)}
.scan .exit.skipped {opacity: .62}
.scan .line {display: flex; justify-content: space-between; gap: 10px; flex-wrap: wrap}
.scan .line b {overflow-wrap: anywhere}
.scan .bar {position: relative; height: 12px; border-radius: 6px; margin: 6px 0 4px;
  background: var(--border-color-primary)}
.scan .bar .fill {position: absolute; inset: 0 auto 0 0; border-radius: 6px}
.scan .bar .mark {position: absolute; top: -4px; bottom: -4px; width: 3px; margin-left: -1px; border-radius: 2px;
  background: var(--body-text-color)}
.scan .costs {display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 10px 0}
.scan .cost {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px}
.scan .cost .number {font-size: 20px; font-weight: 650}
.scan .looks {display: flex; flex-wrap: wrap; gap: 10px; margin-top: 8px}
.scan .looks figure {margin: 0; width: 150px}
.scan .looks img {width: 150px; height: 150px; border-radius: 8px; display: block; object-fit: cover}
.scan .stack {display: flex; height: 26px; border-radius: 8px; overflow: hidden; margin: 8px 0}
.scan .stack div {min-width: 2px}
.scan .key {display: flex; flex-wrap: wrap; gap: 4px 18px}
.scan .key i {display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px}
.scan svg {width: 100%; height: auto; display: block}
.scan svg text {fill: var(--body-text-color); font-size: 13px}
.scan svg .axis {stroke: var(--border-color-primary); stroke-width: 1}
"""

STATES = {
    "answered": "the image leaves here",
    "passed on": "not sure enough: goes on",
    "off": "switched off",
    "not run": "not run",
}


def answer_html(view: ImageView, num_exits: int) -> str:
    """Return the answer, every exit's view of it and what it cost."""
    place = "all exits together" if view.exit_index == num_exits else f"exit {view.exit_index}"
    depth = "after the last layer" if view.exit_index >= num_exits - 1 else "early"
    agree = "the same answer as" if view.label == view.plain_label else f"and not {escape(view.plain_label)}, as"
    exits = "".join(_exit_html(index, exit_view) for index, exit_view in enumerate(view.exits))
    return (
        f'<div class="scan" data-exit="{view.exit_index}"><p class="verdict">{escape(view.label)}</p>'
        f'<p class="quiet">{view.confidence:.1%} sure; answered by {place}, {depth}: {agree} the plain network</p>'
        f'<div class="exits">{exits}</div>{_costs_html(view)}</div>'
    )


def _exit_html(index: int, view: ExitView) -> str:
    skipped = " skipped" if view.state in ("not run", "off") else ""
    would = "would have said" if skipped else "says"
    mark = compared = ""
    if view.threshold is not None:
        mark = f'<div class="mark" style="left: {100 * min(view.threshold, 1):.1f}%" title="threshold"></div>'
        compared = f" · threshold {view.threshold:.3f}"
    return (
        f'<div class="exit{skipped}" data-state="{view.state}" style="border-left-color: {colour_of(index)}">'
        f'<div class="line"><b>{escape(view.name)}</b><span class="quiet">{STATES[view.state]}</span></div>'
        f'<div class="bar"><div class="fill" style="width: {100 * min(max(view.score, 0), 1):.1f}%; '
        f'background: {colour_of(index)}"></div>{mark}</div>'
        f'<div class="line"><span>{would} <b>{escape(view.label)}</b></span>'
        f'<span class="quiet">score {view.score:.3f}{compared} · {view.macs:.0%} of the multiplications</span></div>'
        "</div>"
    )


def _costs_html(view: ImageView) -> str:
    boxes = [("multiplications", f"{view.macs:.0%}", "of the plain network's (computed)")]
    if view.milliseconds is not None and view.plain_milliseconds is not None:
        ratio = view.plain_milliseconds / view.milliseconds
        boxes += [
            ("this network", f"{view.milliseconds:.2f} ms", "measured now, one image"),
            ("plain network", f"{view.plain_milliseconds:.2f} ms", "measured in turns with it"),
            ("speed-up", f"{ratio:.2f}x", "faster" if ratio > 1.02 else "slower" if ratio < 0.98 else "no difference"),
        ]
    return (
        '<div class="costs">'
        + "".join(
            f'<div class="cost"><div class="quiet">{title}</div><div class="number">{number}</div>'
            f'<div class="quiet">{note}</div></div>'
            for title, number, note in boxes
        )
        + "</div>"
    )


def attention_html(view: ImageView) -> str:
    """Return the image as each early exit looks at it; an empty text for a network without attention."""
    looks = [exit_view for exit_view in view.exits if exit_view.attention is not None]
    if not looks:
        return ""
    figures = "".join(
        f'<figure><img src="{_as_data(one.attention)}" alt="where {escape(one.name)} looks">'
        f'<figcaption class="quiet">{escape(one.name)}</figcaption></figure>'
        for one in looks
        if one.attention is not None
    )
    return f'<div class="scan"><b>Where each exit looks</b><div class="looks">{figures}</div></div>'


def _as_data(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shares_html(exits: Sequence[int], names: Sequence[str], macs: float) -> str:
    """
    Return where some images left, as one stacked bar.

    Args:
        exits (`Sequence[int]`): The exit of each image.
        names (`Sequence[str]`): Names of the exits and, last, of the fallback.
        macs (`float`): Mean multiplications of these answers, as a share of the plain network's.
    """
    counts = [sum(place == index for place in exits) for index in range(len(names))]
    parts = [(index, name, count) for index, (name, count) in enumerate(zip(names, counts)) if count]
    bar = "".join(f'<div style="flex: {count}; background: {colour_of(index)}"></div>' for index, _, count in parts)
    key = "".join(
        f'<span><i style="background: {colour_of(index)}"></i>{escape(name)}: {count} of {len(exits)}</span>'
        for index, name, count in parts
    )
    return (
        f'<div class="scan"><b>Where {len(exits)} images left</b><div class="stack">{bar}</div><div class="key">{key}'
        f'</div><p class="quiet">{macs:.0%} of the plain network\'s multiplications on average</p></div>'
    )


def frontier_svg(frontier: SavedFrontier, policy: int | None, found: tuple[float, float] | None) -> str:
    """
    Draw accuracy over cost, with a dot where the network is set.

    Args:
        frontier ([`SavedFrontier`]): The policies.
        policy (`int`, *optional*): The one that is in use.
        found (`tuple[float, float]`, *optional*): Accuracy and cost of the checkpoint's own thresholds, as a ring.
    """
    width, height, left, right, top, bottom = 460, 250, 56, 16, 14, 44
    costs = [*frontier.cost, 1.0, *([found[1]] if found else [])]
    rights = [*frontier.accuracy, frontier.deepest_accuracy, *([found[0]] if found else [])]
    low, high = min(0.0, *costs), max(costs) * 1.04
    least, most = min(rights), max(rights)
    margin = max((most - least) * 0.08, 0.002)
    least, most = least - margin, most + margin

    def x(cost: float) -> float:
        return left + (cost - low) / (high - low) * (width - left - right)

    def y(accuracy: float) -> float:
        return height - bottom - (accuracy - least) / (most - least) * (height - top - bottom)

    def ring(accuracy: float, cost: float, shape: str, title: str) -> str:
        return f'<circle cx="{x(cost):.1f}" cy="{y(accuracy):.1f}" {shape}><title>{title}</title></circle>'

    line = " ".join(f"{x(cost):.1f},{y(accuracy):.1f}" for cost, accuracy in zip(frontier.cost, frontier.accuracy))
    pieces = [
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        f'<text x="{left - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{100 * level:.1f}</text>'
        for level in (least + margin, (least + most) / 2, most - margin)
    ]
    pieces += [
        f'<text x="{x(share):.1f}" y="{height - bottom + 17}" text-anchor="middle">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
        if share <= high
    ]
    middle = (left + width - right) / 2
    pieces.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">mean cost, of the plain network\'s</text>'
    )
    pieces.append(f'<polyline points="{line}" fill="none" stroke="{colour_of(0)}" stroke-width="2.5"/>')
    pieces.append(ring(frontier.deepest_accuracy, 1.0, f'r="5" fill="{colour_of(2)}"', "plain network"))
    if found is not None:
        pieces.append(
            ring(*found, f'r="7" fill="none" stroke="{CHOSEN}" stroke-width="2"', "the checkpoint's own thresholds")
        )
    if policy is not None:
        chosen = frontier.accuracy[policy], frontier.cost[policy]
        pieces.append(ring(*chosen, f'r="7" fill="{CHOSEN}" class="dot"', "these thresholds"))
    return (
        f'<div class="scan"><b>Accuracy (%) over cost</b><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="accuracy over cost">{"".join(pieces)}</svg><div class="key">'
        f'<span><i style="background: {CHOSEN}"></i>set here</span>'
        f'<span><i style="background: {colour_of(0)}"></i>best thresholds</span>'
        f'<span><i style="background: {colour_of(2)}"></i>plain network</span></div></div>'
    )


def rule_html(frontier: SavedFrontier | None, policy: int | None, thresholds: Sequence[float | None]) -> str:
    """Return the thresholds in use, and what they lose and cost on the images that they were found on."""
    shown = ", ".join("off" if value is None or value >= 1 else f"{value:.3f}" for value in thresholds)
    lines = [f"Thresholds: {shown}"]
    if frontier is not None and policy is not None:
        drop = 100 * (frontier.deepest_accuracy - frontier.accuracy[policy])
        unit = "milliseconds" if frontier.unit.startswith("milliseconds") else "multiplications"
        change = (
            f"{drop:.1f} points lost" if drop > 0.05 else f"{-drop:.1f} points gained" if drop < -0.05 else "no loss"
        )
        lines.append(
            f"{change}, {frontier.cost[policy]:.0%} of the {unit}, on the {frontier.samples} images that they were "
            "chosen on; expect a little less on others"
        )
    return '<div class="scan quiet">' + "<br>".join(lines) + "</div>"


__all__ = ["CSS", "answer_html", "attention_html", "frontier_svg", "rule_html", "shares_html"]
