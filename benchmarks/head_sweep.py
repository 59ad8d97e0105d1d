"""Which form of exit head is worth its cost: heads of all forms trained alike, at once, on one backbone they share.

    python benchmarks/head_sweep.py train --dataset_name uoft-cs/cifar100 --bf16 --output_dir runs/head_sweep
    python benchmarks/head_sweep.py measure --output_dir runs/head_sweep --output benchmarks/results/head_sweep.json
    python benchmarks/head_sweep.py table --output benchmarks/results/head_sweep.json

At each exit point stand heads of every form. Each learns as it would alone (0.7 labels, 0.3 soft labels of the
deepest exit), and the backbone gets the mean of the forms' gradients, so that one training compares all of them on
equal terms. `train` saves one model a form and its logits on the search and test images, and goes on from its last
epoch when started again. `measure` gives for each form the accuracy of each exit on the test images, the cost of its
heads in MACs and in milliseconds (PyTorch, and ONNX Runtime where it is installed), and the cost at no loss and at
half a point of loss against the deepest exit, on the exact frontier of the search images. Run it on a quiet machine.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import set_seed

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
from hf_scan.calibration import ExitTable, exit_frontier
from hf_scan.costs import CostModel, describe_machine, measure_costs
from hf_scan.data import DecodedRows, ImagesInMemory, SeededImages, eval_transform, prepare_columns, split_off
from hf_scan.data.digests import tensor_digests
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.runtime import ORTScanForImageClassification, threaded_options
from hf_scan.training.collation import collate_rows
from hf_scan.training.losses import SelfDistillationLoss


# Attention, classifier, width.
FORMS: dict[str, tuple[str, str, int | None]] = {
    "separable": ("separable", "separable", None),
    "separable, nearest": ("nearest", "separable", None),
    "separable, no attention": ("none", "separable", None),
    "separable, twice as wide": ("nearest", "separable", 128),
    "chain, nearest": ("nearest", "chain", None),
    "chain, no attention": ("none", "chain", None),
    "conv": ("conv", "conv", None),
}
DROPS = (0.0, 0.5)


class MeanGradient(torch.autograd.Function):
    """A feature that many forms read: their gradients are averaged, as each would give its own alone."""

    @staticmethod
    def forward(ctx: Any, feature: torch.Tensor, readers: int) -> torch.Tensor:
        ctx.readers = readers
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] / ctx.readers, None


class Sweep(nn.Module):
    """One backbone with heads of several forms at each exit point."""

    def __init__(self, forms: list[str], **settings: Any) -> None:
        super().__init__()
        self.models = {form: self._model(form, settings) for form in forms}
        self.first = self.models[forms[0]]
        for model in self.models.values():
            model.backbone = self.first.backbone
        self.heads = nn.ModuleList(model.exit_heads for model in self.models.values())

    @staticmethod
    def _model(form: str, settings: dict[str, Any]) -> ScanForImageClassification:
        attention, classifier, width = FORMS[form]
        config = ScanConfig(attention_type=attention, classifier_type=classifier, head_width=width, **settings)
        return ScanForImageClassification(config)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """Return the logits of every exit, shallow to deep, by form."""
        *features, last = self.first.extract_features(pixel_values)
        deepest = self.first.backbone.forward_head(last)
        shared = [MeanGradient.apply(feature, len(self.models)) for feature in features]
        return {
            form: [*(head(feature)[1] for head, feature in zip(heads, shared)), deepest]
            for form, heads in zip(self.models, self.heads)
        }


def train(arguments: argparse.Namespace) -> None:
    set_seed(arguments.seed)
    loaded = load_dataset(arguments.dataset_name)
    splits = prepare_columns(DatasetDict(train=loaded["train"], test=loaded["test"]), "img", "fine_label")
    splits["train"], splits["search"] = split_off(splits["train"], 0.1, arguments.seed)
    splits["train"] = splits["train"].select(range(min(arguments.max_train_samples, len(splits["train"]))))
    backbone_kwargs = json.loads(arguments.backbone_kwargs)
    sweep = Sweep(arguments.forms, backbone=arguments.backbone, backbone_kwargs=backbone_kwargs, num_labels=100)
    sweep.to(memory_format=torch.channels_last)
    processor = create_image_processor(sweep.first)
    images = ImagesInMemory(
        splits["train"], processor, flip="alternating", pixels=arguments.pixels, num_epochs=arguments.epochs
    )
    _train(sweep, SeededImages(images, arguments.seed), arguments)
    rows = {name: splits[name].with_transform(eval_transform(processor)) for name in ("search", "test")}
    held_out = {name: DecodedRows(split, name) for name, split in rows.items()}
    for form, model in sweep.models.items():
        model.save_pretrained(arguments.output_dir / form)
    for name, split in held_out.items():
        for form, table in _tables(sweep, split, name).items():
            table.save(arguments.output_dir / form / f"{name}.safetensors")
    facts = {name: getattr(arguments, name) for name in ("backbone", "epochs", "pixels", "seed", "bf16")}
    facts |= {"backbone_kwargs": backbone_kwargs, "dataset": Path(arguments.dataset_name).name}
    facts |= {"splits": {name: len(split) for name, split in splits.items()}}
    (arguments.output_dir / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _train(sweep: Sweep, images: SeededImages, arguments: argparse.Namespace) -> None:
    loss_of = SelfDistillationLoss(0.7, 0.3, 0.0, 3.0, scale_by_temperature=False, label_smoothing=0.1)
    parameters = [*sweep.first.backbone.parameters(), *sweep.heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = arguments.epochs * (len(images) // arguments.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False, final_div_factor=1e4
    )
    parts = {"backbone": sweep.first.backbone, "heads": sweep.heads, "optimizer": optimizer, "schedule": schedule}
    saved, start = arguments.output_dir / "last.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start = state.pop("epochs")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    sweep.train()
    for epoch in range(start, arguments.epochs):
        images.set_epoch(epoch)
        order = torch.Generator().manual_seed(arguments.seed + epoch)
        loader = DataLoader(
            images, arguments.batch_size, shuffle=True, collate_fn=collate_rows, drop_last=True, generator=order
        )
        for batch in tqdm(loader, desc=f"epoch {epoch + 1} of {arguments.epochs}", mininterval=30):
            pixels = batch["pixel_values"].to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                logits = sweep(pixels)
            loss = torch.zeros(())
            for exits in logits.values():
                terms = loss_of([values.float() for values in exits], None, batch["labels"])
                deepest = terms.pop(f"exit_{len(exits) - 1}_label_loss")  # the same for all forms: counted once
                loss = loss + torch.stack(list(terms.values())).sum()
            loss = loss + deepest
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        saved.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "epochs": epoch + 1}, saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").replace(saved)


@torch.inference_mode()
def _tables(sweep: Sweep, split: DecodedRows, name: str) -> dict[str, ExitTable]:
    """Return each form's logits, from one run of the backbone."""
    sweep.eval()
    found: dict[str, list[torch.Tensor]] = {form: [] for form in sweep.models}
    labels, samples = [], []
    for batch in tqdm(DataLoader(split, 250, collate_fn=collate_rows), desc=name, mininterval=30):
        for form, exits in sweep(batch["pixel_values"].to(memory_format=torch.channels_last)).items():
            found[form].append(torch.stack(exits, dim=1))
        labels.append(batch["labels"])
        samples.append(tensor_digests(batch["pixel_values"], batch["labels"]))
    seen = {"labels": torch.cat(labels).numpy(), "samples": np.concatenate(samples), "split": name}
    return {
        form: ExitTable(torch.cat(found[form]).numpy(), model=model.fingerprint(), **seen)
        for form, model in sweep.models.items()
    }


def measure(arguments: argparse.Namespace) -> None:
    facts = json.loads((arguments.output_dir / "facts.json").read_text(encoding="utf-8"))
    rows = []
    for form in tqdm([form for form in FORMS if (arguments.output_dir / form).is_dir()]):
        folder = arguments.output_dir / form
        model = ScanForImageClassification.from_pretrained(folder)
        tables = {name: ExitTable.load(folder / f"{name}.safetensors") for name in ("search", "test")}
        rows.append({"form": form, **accuracies(tables["test"]), **costs(model, tables["search"], arguments)})
    result = {
        **facts,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "command": "python benchmarks/head_sweep.py measure",
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table(arguments)


def accuracies(test: ExitTable) -> dict[str, Any]:
    right = test.logits.argmax(-1) == test.labels[:, None]
    return {"exit_accuracies": [round(float(share), 4) for share in right.mean(0)]}


def costs(model: ScanForImageClassification, search: ExitTable, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the overhead of the heads and the cost at each drop, in plain networks, by MACs and on each clock."""
    found = {"MACs": _cost(search, CostModel.of(model))}
    batch_size = max(arguments.batch_sizes)
    with tempfile.TemporaryDirectory() as scratch:
        model.export_onnx(scratch)
        options = threaded_options(torch.get_num_threads())
        engine = ORTScanForImageClassification.from_pretrained(scratch, session_options=options)
        model.compile_stages()
        for runtime, network in (("PyTorch", model), ("ONNX Runtime", engine)):
            measured = measure_costs(network, batch_size=batch_size, rounds=arguments.rounds)
            network.exit_config = network.exit_config.replace(costs=measured)
            for size in arguments.batch_sizes:
                found[f"{runtime}, batch {size}"] = _cost(search, CostModel.of(network, size))
    return {"head_width": model.config.head_width, "costs": found}


def _cost(search: ExitTable, cost_model: CostModel) -> dict[str, float | None]:
    # The deepest exit answers whoever left nowhere: the ensemble would count the other heads' accuracies in.
    frontier = exit_frontier(search, ExitConfig(fallback="deepest"), cost_model.cumulative)
    goal = float((search.deepest == search.labels).mean())
    costs = cost_model.costs
    found: dict[str, float | None] = {"overhead": round(sum([*costs.stages, *costs.heads]) / cost_model.plain - 1, 4)}
    for drop in DROPS:
        enough = frontier.accuracy >= goal - drop / 100 - 1e-9
        found[f"drop_{drop}"] = round(float(np.min(frontier.cost[enough])) / cost_model.plain_image, 4)
    return found


def table(arguments: argparse.Namespace) -> None:
    """Print each head's accuracies and, for each clock, its overhead / cost at no loss / at half a point of loss."""
    result = json.loads(arguments.output.read_text(encoding="utf-8"))
    clocks = list(result["rows"][0]["costs"])
    print("| head | exits, % | " + " | ".join(f"{clock}" for clock in clocks) + " |")
    print("|---|---|" + "---|" * len(clocks))
    for row in result["rows"]:
        exits = " / ".join(f"{100 * share:.1f}" for share in row["exit_accuracies"])
        cells = [" / ".join(f"{value:.3f}" for value in row["costs"][clock].values()) for clock in clocks]
        print(f"| {row['form']} | {exits} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "measure", "table"])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar100", help="a name on the Hub, or a folder")
    parser.add_argument("--backbone", default="cifar_resnet18")
    parser.add_argument("--backbone_kwargs", default='{"channels": [32, 64, 128, 256]}', help="as JSON")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="those to compare")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--pixels", type=int, nargs="+", default=[16, 24, 32], help="each for a part of the epochs")
    parser.add_argument("--batch_size", type=int, default=256, help="images a training step")
    parser.add_argument("--max_train_samples", type=int, default=45_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64], help="those that are measured")
    parser.add_argument("--rounds", type=int, default=5, help="times that each cost is measured")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/head_sweep"), help="of what is trained")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/head_sweep.json"))
    parsed = parser.parse_args()
    {"train": train, "measure": measure, "table": table}[parsed.step](parsed)
