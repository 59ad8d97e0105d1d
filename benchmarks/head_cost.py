"""What the exit heads cost: MACs and parameters of all of them as a share of the backbone's, and the time of running
every exit over the time of the plain backbone.

    python benchmarks/head_cost.py --threads 2 --output runs/head_cost.md
    python benchmarks/head_cost.py --no-time      # MACs and parameters only, nothing is computed
    python benchmarks/head_cost.py --forms        # milliseconds of each head: as it is, folded, and compiled
    TORCHINDUCTOR_FREEZING=1 python benchmarks/head_cost.py --parts  # where one image's time goes if nothing leaves

Random weights and random images of each network's default size; medians of interleaved rounds.
"""

import argparse
import copy
import itertools
import math
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
from hf_scan.costs import count_macs, describe_machine, interleaved_medians
from hf_scan.model.folded_heads import FoldedHead


BACKBONES = """
    cifar_resnet18 cifar_resnet20 cifar_resnet50 cifar_resnet152 cifar_vgg16_bn cifar_vgg19_bn cifar_wrn20_8
    cifar_wrn44_8 resnet18 resnet50 resnet101 resnetv2_50 resnext50_32x4d wide_resnet50_2 regnety_016 efficientnet_b0
    tf_efficientnetv2_s mobilenetv3_large_100 ghostnet_100 rexnet_100 convnext_tiny densenet121 vgg16_bn
    inception_v3 dla34 hgnetv2_b0 repvit_m1 swin_tiny_patch4_window7_224 vit_small_patch16_224 mobilevit_s
""".split()  # noqa: SIM905


def shares(config: ScanConfig) -> tuple[float, float]:
    """MACs and parameters of the early exits as shares of the backbone's."""
    with torch.device("meta"):
        model = ScanForImageClassification(config)
    costs = count_macs(model)
    heads, backbone = (sum(p.numel() for p in part.parameters()) for part in (model.exit_heads, model.backbone))
    return sum(costs.heads[:-1]) / costs.plain, heads / backbone


def ratio(config: ScanConfig, batch_size: int, rounds: int) -> float:
    """Time of running every exit over that of the plain backbone, both in channels_last."""
    model = ScanForImageClassification(config).eval().to(memory_format=torch.channels_last)
    size = model.config.image_size
    images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        calls = {"all": lambda: model(images), "plain": lambda: model.backbone(images)}
        seconds = interleaved_medians(calls, rounds=rounds)
    return seconds["all"] / seconds["plain"]


def forms(rounds: int) -> None:
    """What an early exit's head takes for one image, as it is, with its batch norms folded, and compiled."""
    print("| network | batch | head | as it is | folded | compiled |\n|---|---:|---:|---:|---:|---:|")
    for name, batch_size in itertools.product(("cifar_resnet18", "resnet18", "resnet50"), (1, 64)):
        model = ScanForImageClassification(ScanConfig(backbone=name)).eval().to(memory_format=torch.channels_last)
        size = model.config.image_size
        images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            for index, feature in enumerate(model.extract_features(images)[:-1]):
                torch.compiler.reset()  # what is compiled belongs to a function's code, which a few heads would fill
                head = model.exit_heads[index]
                calls = {"as it is": head, "folded": FoldedHead(head), "compiled": torch.compile(copy.deepcopy(head))}
                seconds = interleaved_medians({key: partial(call, feature) for key, call in calls.items()}, rounds)
                cells = " | ".join(f"{1000 * value / batch_size:.3f}" for value in seconds.values())
                print(f"| `{name}` | {batch_size} | {index} | {cells} |", flush=True)


PARTS = ("plain", "cut into stages", "exits off", "decisions", "heads")


def parts(name: str, rounds: int) -> dict[str, float]:
    """The seconds that one image takes when every exit looks and it leaves at none, everything compiled: each entry
    is of what the one before it does, and of one thing more."""
    torch.compiler.reset()
    model = ScanForImageClassification(ScanConfig(backbone=name)).eval().to(memory_format=torch.channels_last)
    size, last = model.config.image_size, model.num_exits - 1
    image = torch.randn(1, 3, size, size).to(memory_format=torch.channels_last)
    plain = torch.compile(copy.deepcopy(model.backbone))
    model.compile_stages()
    looking = ExitConfig(thresholds=[math.nextafter(1.0, 0.0)] * last)
    off = ExitConfig(thresholds=[None] * last, fallback="deepest")
    known = torch.zeros(1, model.num_labels)
    run_exit = model.run_exit

    def stages() -> None:
        state: tuple[Any, ...] = (image,)
        for index in range(last + 1):
            state = model.run_stage(index, state)
        model.run_exit(last, state)

    def decisions() -> None:
        model.run_exit = lambda *args: run_exit(*args) if args[0] == last else known  # type: ignore[method-assign]
        model.predict_adaptive(image, looking)
        del model.run_exit

    adaptive = partial(model.predict_adaptive, image)
    calls = (partial(plain, image), stages, partial(adaptive, off), decisions, partial(adaptive, looking))
    with torch.inference_mode():
        return interleaved_medians(dict(zip(PARTS, calls)), rounds, seconds_per_round=0.1)


def main(output: Path, rounds: int) -> None:
    warnings.simplefilter("ignore")
    header = ["backbone", "MACs", "parameters", "MACs, conv"] + ["time, batch 1", "time, batch 32"] * bool(rounds)
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    measured: list[list[str]] = []
    for name in tqdm(BACKBONES):
        num_labels = 100 if name.startswith("cifar_") else 1000
        default = ScanConfig(backbone=name, num_labels=num_labels)
        paper = ScanConfig(backbone=name, num_labels=num_labels, attention_type="conv", classifier_type="conv")
        macs, parameters = shares(default)
        cells = [f"`{name}`", f"{macs:.1%}", f"{parameters:.1%}", f"{shares(paper)[0]:.1%}"]
        if rounds:
            config = ScanConfig(backbone=name, num_labels=num_labels)
            cells += [f"{ratio(config, size, rounds):.2f}x" for size in (1, 32)]
        measured.append(cells[1:])
        lines.append("| " + " | ".join(cells) + " |")
    columns = [[float(cell.rstrip("%x")) for cell in column] for column in zip(*measured)]
    medians = (f"{statistics.median(column):.2f}{cells[0][-1]}" for column, cells in zip(columns, zip(*measured)))
    lines.append("| median | " + " | ".join(medians) + " |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([f"{describe_machine()}.", "", *lines]) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/head_cost.md"), help="file to write the table to")
    parser.add_argument("--no-time", action="store_true", help="count only")
    parser.add_argument("--rounds", type=int, default=7, help="times that each is measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--forms", action="store_true", help="compare the forms of a head instead")
    parser.add_argument(
        "--parts", action="store_true", help="divide the time of one image that leaves nowhere instead"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.forms:
        forms(arguments.rounds)
        sys.exit()
    if arguments.parts:
        print("| network | " + " | ".join(PARTS) + " |\n|---" + "|---:" * len(PARTS) + "|")
        for name in ("cifar_resnet18", "resnet18", "resnet50"):
            cells = " | ".join(f"{1000 * seconds:.3f}" for seconds in parts(name, arguments.rounds).values())
            print(f"| `{name}` | {cells} |", flush=True)
        sys.exit()
    main(arguments.output, 0 if arguments.no_time else arguments.rounds)
