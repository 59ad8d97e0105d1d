"""How accurate forms of exit heads are on a trained backbone that stays as it is, and what they cost.

    python benchmarks/head_forms.py --model tf_efficientnet_lite0 --weights runs/trashnet_plain --data trashnet \
        --image_size 160 --holdout 0.2 --seeds 0 1
    python benchmarks/head_forms.py --model tf_efficientnet_lite0 --weights runs/trashnet_plain --data trashnet \
        --image_size 160 --measure
    python benchmarks/head_forms.py --table

Heads of each form stand at the same exit points, are trained as the search of `hf-scan equip` does, and are tested on
the test split, which chose nothing. `--measure` takes the time of a head in ONNX Runtime, one image at a time on one
thread, as a share of the plain network's; run it on a quiet machine. `head_sweep.py` compares forms of heads whose
backbone is trained with them. The JSON file gets each run as soon as it is there.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.calibration import collect_exit_logits
from hf_scan.costs import count_macs, count_parameters, describe_machine
from hf_scan.data import SeededImages, eval_transform, train_transform
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.workflows.data_arguments import DataArguments, load_splits, title
from hf_scan.workflows.equip_arguments import EquipArguments
from hf_scan.workflows.equip_source import load_source
from hf_scan.workflows.part_costs import costs_of_parts
from hf_scan.workflows.search_exits import train_candidates, wide_network


RESULTS = Path("benchmarks/results/head_forms.json")
SOURCE = ("model", "weights", "data", "image_size", "holdout")
SHARES = ("head_macs", "head_parameters", "head_times")
FORMS: dict[str, dict[str, Any]] = {
    "chain": {"attention_type": "none"},
    "chain, attention": {"attention_type": "nearest"},
    "chain, attention, features of 512": {"attention_type": "nearest", "head_feature_size": 512},
    "chain, 64 wide": {"attention_type": "none", "head_width": 64},
    "separable, attention": {"attention_type": "nearest", "classifier_type": "separable", "head_width": 64},
}


def with_heads(form: str, seed: int, arguments: argparse.Namespace) -> ScanForImageClassification:
    """Return the trained network with fresh heads of a form."""
    source = load_source(EquipArguments(**{name: getattr(arguments, name) for name in SOURCE}, output=""))
    wide = wide_network(source, arguments.max_exits, arguments.exit_points, seed)
    model = ScanForImageClassification(ScanConfig.from_dict({**wide.config.to_dict(), **FORMS[form]}))
    model.backbone.load_state_dict(source.backbone.state_dict())
    return model


def run(form: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the heads of a form, and return what they reach, by exit."""
    data = DataArguments(dataset_name=arguments.data, holdout=arguments.holdout)
    splits = load_splits(data, seed=0, validate=False)  # those of the run that trained the backbone
    model = with_heads(form, seed, arguments).to(memory_format=torch.channels_last)
    processor = create_image_processor(model)
    images = SeededImages(splits["train"].with_transform(train_transform(processor, crop="pad")), seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_train_epochs": arguments.epochs, "per_device_train_batch_size": 64, "seed": seed}
        train_candidates(model, images, folder, resumable=False, **settings)
    table = collect_exit_logits(model.eval(), splits["test"].with_transform(eval_transform(processor)), "test")
    macs, parameters = count_macs(model), count_parameters(model)
    return {
        "form": form,
        "seed": seed,
        "exit_points": model.config.exit_points,
        "head_width": model.config.head_width,
        "accuracies": (table.logits.argmax(-1) == table.labels[:, None]).mean(0).tolist(),
        "head_macs": [head / macs.plain for head in macs.heads[:-1]],
        "head_parameters": [head / parameters.plain for head in parameters.heads[:-1]],
        "n": len(table),
        "splits": {name: len(rows) for name, rows in splits.items()},
        "backbone": model.config.backbone,
        "pixels": model.config.image_size,
        "dataset": title(arguments.data),
        "epochs": arguments.epochs,
        "machine": describe_machine(),
    }


def measure(form: str, arguments: argparse.Namespace) -> None:
    """Keep with a form's runs what a head of it takes, as a share of the plain network's time."""
    torch.set_num_threads(1)
    costs = costs_of_parts(with_heads(form, 0, arguments).eval(), "onnx")
    rows = json.loads(arguments.output.read_text(encoding="utf-8"))
    for row in rows:
        if row["form"] == form:
            keep({**row, "head_times": costs.shares.heads[:-1], "timed": costs.unit}, arguments.output)


def keep(row: dict[str, Any], path: Path) -> None:
    """Write a run, in place of an earlier one of the same form and seed."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [other for other in known if (other["form"], other["seed"]) != (row["form"], row["seed"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps([*kept, row], indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: accuracy of each early exit, mean of the seeds, in percent, and a head's shares of the
    plain network's costs."""
    points = rows[0]["exit_points"]
    lines = [
        f"| form | {' | '.join(points)} | mean | MACs a head | parameters | time |",
        "|---|" + "---:|" * (len(points) + 4),
    ]
    for form in dict.fromkeys(row["form"] for row in rows):
        runs = [row for row in rows if row["form"] == form]
        means = [100 * statistics.mean(column) for column in zip(*(row["accuracies"][:-1] for row in runs))]
        shares = [100 * statistics.mean(runs[0].get(name, [math.nan])) for name in SHARES]
        cells = [f"{value:.1f}" for value in (*means, statistics.mean(means))] + [f"{value:.1f}%" for value in shares]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="of timm or torchvision")
    parser.add_argument("--weights", default="timm", help="as in `hf-scan equip`")
    parser.add_argument("--data", help="a folder of images, or a dataset on the Hub")
    parser.add_argument("--image_size", type=int, help="pixels")
    parser.add_argument("--holdout", type=float, default=0.25, help="share of the train images that is left out")
    parser.add_argument("--exit_points", nargs="+", help="all candidates otherwise")
    parser.add_argument("--max_exits", type=int, default=4, help="as in `hf-scan equip`: how heads share their budget")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--measure", action="store_true", help="take times of forms that were trained")
    parser.add_argument("--table", action="store_true", help="print the results as a table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write")
    given = parser.parse_args()
    for form, seed in [] if given.table else itertools.product(given.forms, given.seeds):
        if given.measure:
            measure(form, given)
        else:
            keep(run(form, seed, given), given.output)
    print(table_of(json.loads(given.output.read_text(encoding="utf-8"))))
