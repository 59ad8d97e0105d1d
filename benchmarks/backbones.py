"""Which of timm's networks can be cut into stages: one line for each of its module files, and the rate over all names.

    python benchmarks/backbones.py --output runs/backbones.md

Networks are made on the meta device, so nothing is computed and no weights are held; for those that are cut,
`tests/test_stages.py` compares the answers bit for bit. Takes about 15 minutes with `--all`, 3 without.
"""

import argparse
import warnings
from pathlib import Path

import timm
import torch
from tqdm import tqdm

import hf_scan.cifar_backbones  # registers networks that are not timm's own
from hf_scan.model.stages import cut_into_stages


def made(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in made(name).parameters())


def outcome(name: str) -> tuple[bool, str]:
    """Whether a network is cut at its default exit points, and where, or why not."""
    try:
        return True, ", ".join(stage.name for stage in cut_into_stages(made(name))[:-1])
    except ValueError as error:
        return False, str(error)


def main(output: Path, every_name: bool) -> None:
    warnings.simplefilter("ignore")
    lines, files, names = ["| file | smallest network | exits, or why none |", "|---|---|---|"], [], []
    for file in tqdm(timm.list_modules(), desc="module files"):
        registered = timm.list_models(module=file)
        if not registered or file == hf_scan.cifar_backbones.__name__.split(".")[-1]:
            continue
        smallest = min(registered, key=parameters)
        cut, words = outcome(smallest)
        files.append(cut)
        lines.append(f"| {file} | `{smallest}` | {'' if cut else 'refused: '}{words} |")
        if every_name:
            names += [outcome(name)[0] for name in registered]
    summary = f"timm {timm.__version__}: {sum(files)} of {len(files)} module files cut (smallest network of each)"
    if every_name:
        summary += f", {sum(names)} of {len(names)} network names"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([summary + ".", "", *lines]) + "\n", encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/backbones.md"), help="file to write the table to")
    parser.add_argument("--all", action="store_true", help="also try every network name")
    arguments = parser.parse_args()
    main(arguments.output, arguments.all)
