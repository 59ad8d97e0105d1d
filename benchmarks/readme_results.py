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

# Readable on white and on black, and told apart by colour-blind readers.
GREY, COLOUR = "#7d8590", "#2f81f7"


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
    """Milliseconds for single images, plain and adaptive, a line for each runtime, with both accuracies."""
    single = [row for row in rows if row["batch_size"] == 1 and "plain_ms" in row]
    left, right, top, step = 190, 700, 44, 52
    bottom = top + step * len(single)
    slowest = max(row["plain_ms"] for row in single)
    scale = (right - left) / (1.1 * slowest)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {bottom + 52}" role="img" '
        'font-family="system-ui, sans-serif" font-size="15">',
        "<title>Milliseconds and accuracy for one image, plain and adaptive</title>",
        f'<path d="M{left} {top - 16}V{bottom}H{right}" stroke="{GREY}" fill="none"/>',
        f'<g fill="{GREY}"><text x="{right}" y="{bottom + 44}" text-anchor="end">milliseconds for one image</text>',
    ]
    for part in range(5):
        x = left + scale * slowest * part / 4
        parts.append(f'<text x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">{slowest * part / 4:.2f}</text>')
    parts.append("</g>")
    for index, row in enumerate(single):
        plain, adaptive = (left + scale * row[f"{form}_ms"] for form in ("plain", "adaptive"))
        y = top + step * index + 16
        accuracies = " to ".join(f"{100 * row[f'{form}_accuracy']:.2f}" for form in ("plain", "adaptive"))
        parts.append(
            f'<g stroke="{COLOUR}" fill="{COLOUR}"><path d="M{plain:.1f} {y}H{adaptive:.1f}" stroke-width="3"/>'
            f'<circle cx="{plain:.1f}" cy="{y}" r="6" fill="none" stroke-width="2"/>'
            f'<circle cx="{adaptive:.1f}" cy="{y}" r="7"/></g>'
            f'<g fill="{GREY}"><text x="{left - 12}" y="{y + 5}" text-anchor="end">{row["runtime"]}</text>'
            f'<text x="{min(adaptive, plain):.1f}" y="{y - 13}">{row["speedup"]:.2f}x, {accuracies} %</text></g>'
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
