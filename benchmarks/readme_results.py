"""Writes the table of results in README.md and the picture above it from the files in `benchmarks/results/`.

    python benchmarks/readme_results.py           # write both
    python benchmarks/readme_results.py --check   # fail if either is not what the files say

The rows are those of `networks.json`; while that file does not exist, those of `deploy.json`. The picture is an SVG
written without a library, so that the same results give the same bytes, in colours that are readable on white and on
black.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "images" / "results.svg"
START, END = "<!-- results: written by benchmarks/readme_results.py -->", "<!-- end of results -->"

# Told apart by colour-blind readers, and readable on white and on black.
GREY, COLOURS = "#7d8590", ("#2f81f7", "#d9730d", "#1a9f60", "#a371f7", "#cf5f8f")


def load_rows() -> list[dict[str, Any]]:
    """The measured rows, one for each network, runtime and batch size."""
    file = RESULTS / "networks.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        return list(content["rows"] if isinstance(content, dict) else content)
    return [row for setting in json.loads((RESULTS / "deploy.json").read_text()) for row in _rows_of_deploy(setting)]


def _rows_of_deploy(setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plain and adaptive contenders of one network, joined. Networks with random weights have no accuracy to show."""
    measured = {
        (contender["engine"], contender["form"], int(size)): (contender["accuracy"], milliseconds)
        for contender in setting["contenders"]
        for size, milliseconds in contender["milliseconds"].items()
    }
    rows = []
    for (engine, form, size), (accuracy, milliseconds) in measured.items():
        if form != "adaptive, 1.0 points" or size == 8:
            continue
        plain_accuracy, plain = measured[engine, "plain", size]
        rows.append(
            {
                "network": setting["backbone"],
                "dataset": setting["dataset"],
                "n": setting["splits"]["test"],
                "plain_accuracy": plain_accuracy,
                "adaptive_accuracy": accuracy,
                "runtime": engine,
                "batch_size": size,
                "threads": setting["threads"],
                "plain_ms": plain,
                "adaptive_ms": milliseconds,
                "speedup": plain / milliseconds,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown row for each row, in the order of the file."""
    lines = [
        "| network | test images | plain | adaptive | runtime | batch | speed-up |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        speedup = f"{row['speedup']:.2f}x"
        cells = (
            row["network"],
            f"{row['n']:,} of {row['dataset']}",
            f"{100 * row['plain_accuracy']:.2f}%",
            f"{100 * row['adaptive_accuracy']:.2f}%",
            row["runtime"],
            row["batch_size"],
            f"**{speedup}**" if row["speedup"] > 1 else speedup,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy over milliseconds for single images: a line from the plain network to the adaptive one, by runtime."""
    single = [row for row in rows if row["batch_size"] == 1 and "plain_ms" in row]
    width, height, left, right, top, bottom = 720, 360, 72, 24, 44, 56
    slowest = 1.15 * max(row["plain_ms"] for row in single)
    accuracies = [100 * row[name] for row in single for name in ("plain_accuracy", "adaptive_accuracy")]
    low, high = int(min(accuracies)) - 0.5, min(100.5, max(accuracies) + 0.5)

    def place(milliseconds: float, accuracy: float) -> tuple[float, float]:
        x = left + milliseconds / slowest * (width - left - right)
        return round(x, 1), round(top + (high - accuracy) / (high - low) * (height - top - bottom), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="14">',
        "<title>Accuracy over milliseconds for one image, plain and adaptive</title>",
        f'<g stroke="{GREY}" fill="none"><path d="M{left} {top}V{height - bottom}H{width - right}"/></g>',
        f'<g fill="{GREY}">',
        f'<text x="{left - 8}" y="{top - 20}">accuracy, %</text>',
        f'<text x="{width - right}" y="{height - 12}" text-anchor="end">milliseconds for one image</text>',
    ]
    for step in range(5):
        milliseconds, accuracy = slowest * step / 4.6, low + (high - low) * step / 4
        x, y = place(milliseconds, accuracy)
        parts.append(f'<text x="{x}" y="{height - bottom + 20}" text-anchor="middle">{milliseconds:.2f}</text>')
        parts.append(f'<text x="{left - 8}" y="{y + 5}" text-anchor="end">{accuracy:.1f}</text>')
    parts.append("</g>")
    for index, row in enumerate(single):
        colour = COLOURS[index % len(COLOURS)]
        (x0, y0), (x1, y1) = (
            place(row[f"{form}_ms"], 100 * row[f"{form}_accuracy"] - 0.12 * index) for form in ("plain", "adaptive")
        )
        label = f"{row['runtime']}, {row['speedup']:.2f}x"
        parts.append(
            f'<g stroke="{colour}" fill="{colour}"><path d="M{x0} {y0}L{x1} {y1}" stroke-width="2"/>'
            f'<circle cx="{x0}" cy="{y0}" r="5" fill="none" stroke-width="2"/><circle cx="{x1}" cy="{y1}" r="6"/>'
            f'<text x="{x0 + 10}" y="{y0 + 5}" stroke="none">{label}</text></g>'
        )
    return "\n".join([*parts, "</svg>", ""])


def expected_readme(rows: Sequence[Mapping[str, Any]]) -> str:
    """README.md with the table of these rows between its two comments."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    return f"{before}{START}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    check = parser.parse_args().check
    rows = load_rows()
    files = {README: expected_readme(rows), PICTURE: picture(rows)}
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if check:
        print("\n".join(f"{path.relative_to(ROOT)} is not what the results say" for path in stale))
        return int(bool(stale))
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
