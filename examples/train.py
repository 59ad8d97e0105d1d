"""Train a SCAN classifier on any image classification dataset, find its thresholds, test it, and save it.

    python examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100
    python examples/train.py --dataset_name food101 --backbone resnet50 --crop resized --output_dir runs/food101
    accelerate launch examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100
    torchrun --nproc_per_node 2 examples/train.py examples/recipes/cifar100_resnet20.yaml --use_cpu ...

A recipe is a YAML file of flags. Flags after it win. All flags of `TrainingArguments` are there.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict, load_dataset
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments, calibrate
from hf_scan.data import create_image_processor, eval_transform, prepare_columns, split_off, train_transform
from hf_scan.folders import check_replaceable, replaced_folder
from hf_scan.model_card import create_model_card
from hf_scan.report import exit_report, exit_table, speedup_lines


# What `Trainer` writes while it runs.
KEPT = ("checkpoint-*", "runs")


@dataclass
class DataArguments:
    """Where the images come from, and how they are split and augmented."""

    dataset_name: str = field(metadata={"help": "A dataset on the Hub, a folder of images, or one of parquet files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split for the final figures. Defaults to 'test', else 'validation', else a tenth of train."
        },
    )
    holdout: float = field(
        default=0.1, metadata={"help": "Share of the train split that is kept for the threshold search. 0 for none."}
    )
    crop: str = field(
        default="pad", metadata={"help": "Augmentation: 'pad' for small images, 'resized' for large ones, or 'none'."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the train images."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on the first so many images."})


@dataclass
class ModelArguments:
    """What the network is, and how its thresholds are found."""

    backbone: str = field(default="cifar_resnet18", metadata={"help": "A model of timm."})
    backbone_kwargs: str = field(default="{}", metadata={"help": "More arguments for timm, as JSON."})
    exit_points: list[str] | None = field(
        default=None, metadata={"help": "Modules to exit after: names, or indices of taps."}
    )
    attention_type: str = field(default="separable", metadata={"help": "'separable', 'conv' or 'none'."})
    classifier_type: str = field(default="separable", metadata={"help": "'separable' or 'conv'."})
    head_width: int = field(default=64, metadata={"help": "Channels in separable heads on wide features."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels. Defaults to the backbone's."})
    beta: float = field(default=0.5, metadata={"help": "Acceleration that a point of accuracy is worth, in search."})


def parse_arguments(arguments: list[str]) -> tuple[DataArguments, ModelArguments, ScanTrainingArguments]:
    """Flags, after a recipe or without one."""
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        path = Path(arguments[0])
        if not path.is_file():
            raise FileNotFoundError(f"There is no recipe {path}; expected a YAML file of flags.")
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"The recipe {path} holds a {type(recipe).__name__}; expected a line `flag: value` each.")
        flags: list[str] = []
        for name, value in recipe.items():
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
        arguments = [*flags, *arguments[1:]]
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, ScanTrainingArguments), description=__doc__.splitlines()[0], allow_abbrev=False
    )
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def load_splits(data: DataArguments, seed: int, validate: bool) -> DatasetDict:
    """The splits to train, search and test on, and one to watch training by if it is watched. They are disjoint."""
    loaded = load_dataset(data.dataset_name, data.dataset_config_name)
    test_split = data.test_split or next((name for name in ("test", "validation") if name in loaded), None)
    for flag, split in (("train_split", data.train_split), ("test_split", test_split)):
        if split is not None and split not in loaded:
            raise ValueError(f"{data.dataset_name} has no split {split!r}; it has {list(loaded)}. Set `--{flag}`.")
    if data.train_split == test_split:
        raise ValueError(f"`--train_split` and `--test_split` are both {test_split!r}; expected two splits.")
    chosen = {"train": loaded[data.train_split]}
    if test_split is not None:
        chosen["test"] = loaded[test_split]
    splits = prepare_columns(DatasetDict(chosen), data.image_column, data.label_column)
    if test_split is None:
        splits["train"], splits["test"] = split_off(splits["train"], 0.1, seed)
    if data.holdout:
        splits["train"], splits["search"] = split_off(splits["train"], data.holdout, seed)
        if validate:
            splits["train"], splits["validation"] = split_off(splits["train"], data.holdout, seed)
    for split, most in (("train", data.max_train_samples), ("test", data.max_test_samples)):
        if most is not None:
            splits[split] = splits[split].select(range(min(most, len(splits[split]))))
    return splits


def main() -> None:
    data, network, args = parse_arguments(sys.argv[1:])
    if args.push_to_hub:
        raise ValueError("`--push_to_hub` is not supported by this script. Load the result and call `push_to_hub`.")
    if args.eval_strategy != "no" and not data.holdout:
        raise ValueError("`--eval_strategy` needs images that are not trained on; set `--holdout` above 0.")
    check_replaceable(args.output_dir, KEPT)
    set_seed(args.seed)
    with args.main_process_first(desc="loading the dataset"):
        splits = load_splits(data, args.seed, validate=args.eval_strategy != "no")
    names = splits["train"].features["labels"].names
    model = ScanForImageClassification(
        ScanConfig(
            backbone=network.backbone,
            backbone_kwargs=json.loads(network.backbone_kwargs),
            exit_points=[int(point) if point.isdigit() else point for point in network.exit_points or []] or None,
            attention_type=network.attention_type,
            classifier_type=network.classifier_type,
            head_width=network.head_width,
            image_size=network.image_size,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
    )
    processor = create_image_processor(model)
    augment = train_transform(processor, data.crop, data.flip)
    train = splits["train"].with_transform(augment)
    held_out = {name: splits[name].with_transform(eval_transform(processor)) for name in splits if name != "train"}
    trainer = ScanTrainer(
        model, args, train_dataset=train, eval_dataset=held_out.get("validation"), processing_class=processor
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and checkpoint.lower() in ("true", "last"):
        checkpoint = get_last_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)

    if "search" in held_out:
        # One process searches, all of them score with what it found.
        found: list[Any] = [None]
        if args.process_index == 0:
            found = [calibrate(model, held_out["search"], beta=network.beta, seed=args.seed)]
        model.exit_config = broadcast_object_list(found)[0]
    scores = trainer.evaluate(held_out["test"], metric_key_prefix="test")
    if trainer.is_world_process_zero():
        scores = {name.removeprefix("test_"): score for name, score in scores.items()}
        report = exit_report(model, scores)
        facts: dict[str, Any] = {
            "dataset": data.dataset_name,
            "splits": {name: len(rows) for name, rows in splits.items()},
            "seed": args.seed,
            "processes": args.world_size,
            "recipe": {
                "epochs": trainer.state.epoch,
                "steps": trainer.state.global_step,
                "images a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "optimizer": f"{args.optim}, learning rate {args.learning_rate}, weight decay {args.weight_decay}",
                "schedule": str(args.lr_scheduler_type),
                "weights": f"label {args.label_weight}, soft label {args.soft_label_weight}, hint {args.hint_weight}",
            },
        }
        with replaced_folder(args.output_dir, KEPT) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            (folder / "metrics.json").write_text(json.dumps({**facts, **report}, indent=2) + "\n", encoding="utf-8")
            name = args.hub_model_id or args.output_dir
            create_model_card(model, report, facts, model_name=name).save(folder / "README.md")
        print(f"\n{len(splits['test'])} test images of {data.dataset_name}, seed {args.seed}")
        print("\n".join([exit_table(report), *speedup_lines(report), f"Written to {args.output_dir}"]))


if __name__ == "__main__":
    main()
