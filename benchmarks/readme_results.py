"""Writes the tables of results in README.md and docs/benchmarks.md, and README's picture, from `benchmarks/results/`.

    python benchmarks/readme_results.py           # write them
    python benchmarks/readme_results.py --check   # fail if one is not what the files say
    python benchmarks/readme_results.py --equip runs/trashnet_equip runs/trashnet_equip_finetuned   # take these in

The rows are those of `networks.json`, in the README of single images in ONNX Runtime alone; those of `equip.json`,
which holds what `hf-scan equip` wrote into folders that `--equip` names; and those of `placement_margin.json`. The
picture is an SVG written without a library, so that the same results give the same bytes, in colours that are
readable on white and on black.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_scan.reporting.report import exit_table


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "images" / "results.svg"
START, END = "<!-- results: written by benchmarks/readme_results.py -->", "<!-- end of results -->"
MARGIN_START, MARGIN_END = "<!-- margin: written by benchmarks/readme_results.py -->", "<!-- end of margin -->"
EQUIP_START, EQUIP_END = "<!-- equip: written by benchmarks/readme_results.py -->", "<!-- end of equip -->"

# Readable on white and on black, and told apart by colour-blind readers.
GREY, COLOURS = "#7d8590", ("#2f81f7", "#d9730d", "#1a9f60", "#a371f7", "#cf5f8f")


def load_rows() -> list[dict[str, Any]]:
    """The rows for the README: of single images in ONNX Runtime. All others are on the page of benchmarks."""
    return [row for row in page_rows() if row["batch_size"] == 1 and row["runtime"].startswith("ONNX Runtime")]


def page_rows() -> list[dict[str, Any]]:
    """All measured rows, one for each network, runtime and batch size."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "networks.json").read_text(encoding="utf-8"))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown row for each row, in the order of the file. A batch size that all share is left out."""
    cells = {
        "network": [row["network"] for row in rows],
        "test images": [f"{row['n']:,} of {row['dataset']}" for row in rows],
        "plain": [f"{100 * row['plain_accuracy']:.2f}%" for row in rows],
        "adaptive": [f"{100 * row['adaptive_accuracy']:.2f}%" for row in rows],
        "runtime": [row["runtime"] for row in rows],
        "batch": [str(row["batch_size"]) for row in rows],
        "speed-up": [f"**{row['speedup']:.2f}x**" if row["speedup"] > 1 else f"{row['speedup']:.2f}x" for row in rows],
    }
    if len(set(cells["batch"])) == 1:
        del cells["batch"]
    words = ("network", "test images", "runtime")
    rules = ["---" if name in words else "---:" for name in cells]
    lines = [f"| {' | '.join(cells)} |", f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in zip(*cells.values()))])


def picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Accuracy over milliseconds for single images of the first network: a line from the plain network to the adaptive
    answers, for each runtime, and the exits as they are alone where these were measured.
    """
    single = [row for row in rows if row["batch_size"] == 1 and row["network"] == rows[0]["network"]]
    ends = [[(row[f"{form}_ms"], 100 * row[f"{form}_accuracy"]) for form in ("plain", "adaptive")] for row in single]
    alone = zip(single[0].get("exit_ms", []), single[0].get("exit_accuracies", []))
    exits = [(milliseconds, 100 * accuracy) for milliseconds, accuracy in alone]
    accuracies = [accuracy for line in [*ends, exits] for _, accuracy in line]
    low, high = math.floor(min(accuracies)) - 1, min(100, math.ceil(max(accuracies) + 0.5))
    times = _round_steps(max(milliseconds for line in [*ends, exits] for milliseconds, _ in line))
    left, right, top, bottom = 56, 700, 52, 300

    def place(milliseconds: float, accuracy: float) -> str:
        x = left + milliseconds / times[-1] * (right - left)
        return f"{x:.1f} {bottom - (accuracy - low) / (high - low) * (bottom - top):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {bottom + 72 + 26 * len(single)}" role="img" '
        'font-family="system-ui, sans-serif" font-size="17">',
        "<title>Accuracy over milliseconds for one image, plain and adaptive</title>",
        f'<g fill="{GREY}"><text x="{right}" y="{bottom + 44}" text-anchor="end">milliseconds for one image</text>',
        '<text x="8" y="24">accuracy, %</text>',
        '<text x="394" y="24">adaptive answers</text><text x="580" y="24">plain network</text>',
        '<circle cx="380" cy="18" r="7"/>',
        f'<circle cx="566" cy="18" r="6" fill="none" stroke="{GREY}" stroke-width="2.5"/>',
    ]
    for accuracy in range(low, high + 1, max(1, (high - low) // 5)):
        parts.append(f'<path d="M{place(0, accuracy)}H{right}" stroke="{GREY}" stroke-opacity="0.25"/>')
        parts.append(_text(place(0, accuracy), f"{accuracy}", "end", -10, 6))
    parts += [_text(place(milliseconds, low), f"{milliseconds:g}", "middle", 0, 22) for milliseconds in times]
    parts.append("</g>")
    for exit_ms, accuracy in exits:
        parts.append(f'<circle r="4" fill="{GREY}" transform="translate({place(exit_ms, accuracy)})"/>')
    if exits:
        parts.append(_text(place(*exits[0]), "an exit alone", "start", 10, 5).replace("<text", f'<text fill="{GREY}"'))
    for index, (row, (plain, adaptive)) in enumerate(zip(single, ends)):
        colour, y = COLOURS[index % len(COLOURS)], bottom + 76 + 26 * index
        circles = f'<circle r="6" fill="none" transform="translate({place(*plain)})"/>'
        circles += f'<circle r="6" fill="{colour}" transform="translate({place(*adaptive)})"/>'
        parts.append(
            f'<g stroke="{colour}" stroke-width="2.5"><path d="M{place(*plain)}L{place(*adaptive)}"/>{circles}'
            f'<path d="M{left} {y - 6}h24"/></g>'
            f'<text x="{left + 34}" y="{y}" fill="{colour}">{row["runtime"]}: {plain[0]:.1f} to {adaptive[0]:.1f} ms, '
            f"{plain[1]:.1f} to {adaptive[1]:.1f} %, {row['speedup']:.2f}x</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _round_steps(most: float) -> list[float]:
    """Round numbers from 0 to at least so much, four to six of them."""
    magnitude = 10 ** math.floor(math.log10(most / 4))
    step = next(part * magnitude for part in (1, 2, 2.5, 5, 10) if part * magnitude >= most / 5)
    return [step * count for count in range(math.ceil(most / step) + 1)]


def _text(place: str, text: str, anchor: str, right: float, down: float) -> str:
    x, y = map(float, place.split())
    return f'<text x="{x + right:.1f}" y="{y + down:.1f}" text-anchor="{anchor}">{text}</text>'


def equip_tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """What each run of `hf-scan equip` printed in its end, and where."""
    parts = []
    for run in runs:
        images = ", ".join(f"{count:,} {name}" for name, count in run["splits"].items())
        parts.append(f"Backbone {run['recipe']['backbone']}; {images} images, seed {run['seed']}; {run['machine']}:")
        parts.append(exit_table(run))
        speedups = [f"{name} {value:.2f}x" for name, value in run["speedup"].items()]
        parts.append(f"Speed-up {', '.join(speedups)}.")
    return "\n\n".join(parts)


def margin_table(results: Mapping[str, Any]) -> str:
    """What `placement_margin.py` found: one row for each network and way of choosing."""
    lines = [
        "| network | images that choose | cross-fitting of | points lost on others | spread | cost |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for network, result in results.items():
        for row in result["rows"]:
            figures = f"{row['lost']:.2f} | {row['spread']:.2f} | {row['cost']:.3f}"
            lines.append(f"| {network} | {row['images']} | {row['cross_fitting']} | {figures} |")
    return "\n".join(lines)


def take_in(folders: Sequence[Path]) -> None:
    """Keep what runs of `hf-scan equip` measured, without the folders of a machine."""
    runs = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    names = ("dataset", "splits", "seed", "machine", "recipe", "rows", "speedup")
    kept = [
        {name: run[name] for name in names}
        | {"heads": {row["name"]: row["head"] for row in run["placement"]["rows"] if row["chosen"]}}
        for run in runs
    ]
    (RESULTS / "equip.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def expected(text: str, written: str, start: str = START, end: str = END) -> str:
    """A file's text with something written between two comments."""
    before, rest = text.split(start)
    return f"{before}{start}\n{written}\n{end}{rest.split(end)[1]}"


def expected_files() -> dict[Path, str]:
    """Return the text that each file should have."""
    equipped = equip_tables(json.loads((RESULTS / "equip.json").read_text(encoding="utf-8")))
    margins = margin_table(json.loads((RESULTS / "placement_margin.json").read_text(encoding="utf-8")))
    page = expected(PAGE.read_text(encoding="utf-8"), table(page_rows()))
    page = expected(page, margins, MARGIN_START, MARGIN_END)
    return {
        README: expected(README.read_text(encoding="utf-8"), table(load_rows())),
        PAGE: expected(page, equipped, EQUIP_START, EQUIP_END),
        PICTURE: picture(load_rows()),
    }


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    parser.add_argument("--equip", type=Path, nargs="+", help="folders of `hf-scan equip` whose figures are shown")
    given = parser.parse_args()
    if given.equip:
        take_in(given.equip)
    files = expected_files()
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if given.check:
        print("\n".join(f"{path.relative_to(ROOT)} is not what the results say" for path in stale))
        return int(bool(stale))
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
