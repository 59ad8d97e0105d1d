"""Train a SCAN classifier on any image classification dataset, find its thresholds, test it, and save it.

    python examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100
    python examples/train.py --dataset_name food101 --backbone resnet50 --crop resized --output_dir runs/food101
    python examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100_plain --plain
    accelerate launch examples/train.py examples/recipes/cifar100_resnet20.yaml --output_dir runs/cifar100
    torchrun --nproc_per_node 2 examples/train.py examples/recipes/cifar100_resnet20.yaml --use_cpu ...

A recipe is a YAML file of flags; it can include another. Flags after it win. All flags of `TrainingArguments` are
there. `--plain` trains the backbone without exits by the same recipe, from the same initial weights; the other run
shows its accuracy beside its own when it is told where that is: `--plain_metrics runs/cifar100_plain/metrics.json`.
`--push_to_hub --hub_model_id org/name` pushes the folder, and checkpoints on the way; the token is that of `hf auth
login` or `HF_TOKEN`.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict, load_dataset
from timm.layers import BatchNormAct2d
from transformers import HfArgumentParser, TimmWrapperForImageClassification, Trainer, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments, calibrate
from hf_scan.calibration import ExitTable, collect_exit_logits, exit_frontier
from hf_scan.calibration.splits import LEAST_SAMPLES
from hf_scan.costs import CostModel, describe_machine
from hf_scan.data import (
    DecodedRows,
    EpochCallback,
    ImagesInMemory,
    SeededImages,
    check_images,
    eval_transform,
    prepare_columns,
    split_off,
    train_transform,
)
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.reporting.model_card import create_model_card
from hf_scan.reporting.plotting import plot_frontier, plot_training
from hf_scan.reporting.report import exit_report, exit_table, speedup_lines
from hf_scan.training.baseline import plain_accuracy, plain_copy
from hf_scan.training.checkpoints import CheckedTrainer, read_trained_on
from hf_scan.training.output_dirs import last_whole_checkpoint, lock_output_folder, replaced_folder
from hf_scan.training.stage_features import StageFeatures, extract_stage_features


# What `Trainer` writes while it runs.
KEPT = ("checkpoint-*", "runs")
# Where features of a frozen backbone are while the heads are trained.
FEATURES = "features"


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
    search_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to search thresholds on, in place of a part of the train split. Needed where the backbone "
            "was trained on that split before, or on images that are not known."
        },
    )
    holdout: float = field(
        default=0.1,
        metadata={"help": "Share of the train split that is kept for the threshold search, or for validation."},
    )
    crop: str = field(
        default="pad", metadata={"help": "Augmentation: 'pad' for small images, 'resized' for large ones, or 'none'."}
    )
    flip: str = field(
        default="true",
        metadata={"help": "Mirror half of the train images: 'true', 'false', or 'alternating' with `--in_memory`."},
    )
    pixels: list[int] | None = field(
        default=None,
        metadata={"help": "With `--in_memory`: train images' sizes, each for an equal part of the epochs."},
    )
    auto_augment: str = field(
        default="none", metadata={"help": "Policy of torchvision's AutoAugment: 'cifar10', 'imagenet' or 'none'."}
    )
    erase: float = field(
        default=0.0, metadata={"help": "Share of each train image that a square blanks out (Cutout)."}
    )
    check_images: bool = field(
        default=True, metadata={"help": "Decode every image once before training, to name those that cannot be read."}
    )
    in_memory: bool = field(
        default=False,
        metadata={
            "help": "Decode all images once. For small images of one size; on a GPU, they stay there, unless workers "
            "augment them."
        },
    )
    store_features: bool = field(
        default=True,
        metadata={"help": "Store what a frozen backbone makes of the train images, where they are not augmented."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, for the card: 'mit', say."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images, chosen at random."}
    )
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on so many images, chosen at random."})


@dataclass
class ModelArguments:
    """What the network is, and how its thresholds are found."""

    backbone: str = field(default="cifar_resnet18", metadata={"help": "A model of timm."})
    backbone_kwargs: str = field(default="{}", metadata={"help": "More arguments for timm, as JSON."})
    exit_points: list[str] | None = field(
        default=None, metadata={"help": "Modules to exit after: names, or indices of taps."}
    )
    attention_type: str = field(default="separable", metadata={"help": "'separable', 'nearest', 'conv' or 'none'."})
    classifier_type: str = field(default="separable", metadata={"help": "'separable', 'chain' or 'conv'."})
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={"help": "Share of a batch in batch norm's running means. Defaults to the network's."},
    )
    head_width: int | None = field(
        default=None, metadata={"help": "Channels at which heads work that are not 'conv'. Defaults to a rule."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels. Defaults to the backbone's."})
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Trained weights to start from: 'timm' for timm's own of that name, or a checkpoint of the plain "
            "backbone, such as `--plain` writes."
        },
    )
    plain: bool = field(default=False, metadata={"help": "Train the backbone without exits, to compare with."})
    plain_metrics: str | None = field(
        default=None, metadata={"help": "The `metrics.json` of a run with `--plain`, to show its accuracy."}
    )
    beta: float = field(default=0.5, metadata={"help": "Acceleration that a point of accuracy is worth, in search."})


def parse_arguments(arguments: list[str]) -> tuple[DataArguments, ModelArguments, ScanTrainingArguments]:
    """Flags, after a recipe or without one."""
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        flags: list[str] = []
        for name, value in read_recipe(Path(arguments[0])).items():
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
        arguments = [*flags, *arguments[1:]]
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, ScanTrainingArguments), description=__doc__.splitlines()[0], allow_abbrev=False
    )
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def read_recipe(path: Path) -> dict[str, Any]:
    """The flags of a recipe, and of one beside it that it includes."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}; expected a YAML file of flags.")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} holds a {type(recipe).__name__}; expected a line `flag: value` each.")
    included = recipe.pop("include", None)
    return {**read_recipe(path.parent / included), **recipe} if included else recipe


def _check_split_names(dataset: str, named: dict[str, str], found: list[str]) -> None:
    for name, split in named.items():
        if split not in found:
            raise ValueError(f"{dataset} has no split {split!r}; it has {found}. Set `--{name}_split`.")
        for other, same in named.items():
            if other != name and split == same:
                raise ValueError(
                    f"`--{name}_split` and `--{other}_split` are both {split!r}; expected splits that share no images."
                )


def _name_unseen_classes(splits: DatasetDict) -> None:
    trained = set(splits["train"].unique("labels"))
    names = splits["train"].features["labels"].names
    for split, rows in splits.items():
        labels = set(rows.unique("labels"))
        if unseen := sorted(labels - trained):
            print(
                f"The {split!r} split has {len(unseen)} classes without a train image, which cannot be learned, such "
                f"as {names[unseen[0]]!r}.",
                file=sys.stderr,
            )


def check_search_split(splits: DatasetDict) -> None:
    """Refuse a split that thresholds cannot be searched on, before the training that would come first."""
    if "search" not in splits:
        return
    count, classes = len(splits["search"]), len(splits["search"].unique("labels"))
    if count < LEAST_SAMPLES or classes < 2:
        raise ValueError(
            f"The 'search' split has {count} images of {classes} classes; thresholds need at least {LEAST_SAMPLES} "
            "images and two classes. Set a larger `--holdout`, name a `--search_split`, or set `--holdout 0` to search"
            " none."
        )


def load_splits(data: DataArguments, seed: int, validate: bool, num_proc: int | None = None) -> DatasetDict:
    """The splits to train, search and test on, and one to watch training by if it is watched. They are disjoint."""
    loaded = load_dataset(data.dataset_name, data.dataset_config_name)
    test_split = data.test_split or next((name for name in ("test", "validation") if name in loaded), None)
    asked = {"train": data.train_split, "test": test_split, "search": data.search_split}
    named = {name: split for name, split in asked.items() if split is not None}
    _check_split_names(data.dataset_name, named, list(loaded))
    chosen = {name: loaded[split] for name, split in named.items()}
    splits = prepare_columns(DatasetDict(chosen), data.image_column, data.label_column)
    if data.check_images and PartialState().is_main_process:
        for name, rows in splits.items():  # before they are shuffled, so that rows are those of the dataset
            check_images(rows, named[name], num_proc)
    if test_split is None:
        splits["train"], splits["test"] = split_off(splits["train"], 0.1, seed)
    if data.holdout and data.search_split is None:
        splits["train"], splits["search"] = split_off(splits["train"], data.holdout, seed)
    if data.holdout and validate:
        splits["train"], splits["validation"] = split_off(splits["train"], data.holdout, seed)
    for split, most in (("train", data.max_train_samples), ("test", data.max_test_samples)):
        if most is not None:
            # Not the first: folders of images are sorted by class.
            splits[split] = splits[split].shuffle(seed=seed).select(range(min(most, len(splits[split]))))
    _name_unseen_classes(splits)
    return splits


def prepare_images(
    splits: DatasetDict, data: DataArguments, args: ScanTrainingArguments, processor: BaseImageProcessor
) -> dict[str, Any]:
    """Each split as a dataset of `pixel_values` and `labels`, the train split augmented."""
    held_out = {name: splits[name].with_transform(eval_transform(processor)) for name in splits if name != "train"}
    settings: dict[str, Any] = {
        "crop": data.crop,
        "flip": data.flip if data.flip == "alternating" else flips(data),
        "auto_augment": data.auto_augment,
        "erase": data.erase,
    }
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    if not data.in_memory and (data.pixels or data.flip == "alternating"):
        raise ValueError("`--pixels` and `--flip alternating` are for images in memory; set `--in_memory true`.")
    if not data.in_memory:
        train = splits["train"].with_transform(train_transform(processor, **settings))
        return {**held_out, "train": SeededImages(train, args.seed)}
    if args.dataloader_num_workers == 0 and args.device.type != "cpu":
        settings["device"] = args.device
        args.dataloader_pin_memory = False
    settings |= {"pixels": data.pixels, "num_epochs": max(1, round(args.num_train_epochs))}
    in_memory = {name: DecodedRows(rows, name) for name, rows in held_out.items()}
    return {**in_memory, "train": SeededImages(ImagesInMemory(splits["train"], processor, **settings), args.seed)}


def create_model(network: ModelArguments, names: list[str]) -> ScanForImageClassification:
    """The network, with new weights or with those that are asked for."""
    settings: dict[str, Any] = {
        "backbone_kwargs": json.loads(network.backbone_kwargs),
        "exit_points": [int(point) if point.isdigit() else point for point in network.exit_points or []] or None,
        "attention_type": network.attention_type,
        "classifier_type": network.classifier_type,
        "head_width": network.head_width,
        "image_size": network.image_size,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if network.backbone_weights is None:
        return ScanForImageClassification(ScanConfig(backbone=network.backbone, **settings))
    if network.backbone_weights == "timm":
        return ScanForImageClassification.from_timm(
            network.backbone, pretrained=True, num_labels=len(names), **settings
        )
    plain = TimmWrapperForImageClassification.from_pretrained(network.backbone_weights)
    found = plain.config.architecture.split(".")[0]
    if network.backbone.split(".")[0] not in (found, ModelArguments.backbone):
        raise ValueError(
            f"`--backbone` is {network.backbone!r}, and the weights in {network.backbone_weights} are of {found!r}. "
            "Leave `--backbone` out, or name other weights."
        )
    trained_on = read_trained_on(network.backbone_weights)
    return ScanForImageClassification.from_timm(
        plain.timm_model, num_labels=len(names), trained_on=trained_on, **settings
    )


def flips(data: DataArguments) -> bool:
    """Whether train images are mirrored."""
    if data.flip.lower() not in ("true", "false", "alternating"):
        raise ValueError(f"`--flip` is {data.flip!r}; expected 'true', 'false' or 'alternating'.")
    return data.flip.lower() != "false"


def augments(data: DataArguments) -> bool:
    """Whether a train image is another one in each epoch."""
    return (
        data.crop != "none" or flips(data) or data.pixels is not None or data.auto_augment != "none" or data.erase > 0
    )


def main() -> None:
    data, network, args = parse_arguments(sys.argv[1:])
    if args.eval_strategy != "no" and not data.holdout:
        raise ValueError("`--eval_strategy` needs images that are not trained on; set `--holdout` above 0.")
    if network.plain and (args.mixup_alpha or args.cutmix_alpha or args.freeze_backbone):
        raise ValueError(
            "`--plain` trains with a stock `Trainer`, which mixes no images and freezes nothing; leave out "
            "`--mixup_alpha`, `--cutmix_alpha` and `--freeze_backbone`."
        )
    plain_accuracy_there = None
    if network.plain_metrics is not None:
        plain_accuracy_there = json.loads(Path(network.plain_metrics).read_text(encoding="utf-8"))["accuracy"]
    if args.freeze_backbone and network.backbone_weights is None:
        raise ValueError("`--freeze_backbone` is for a trained backbone; name its weights with `--backbone_weights`.")
    lock = lock_output_folder(args.output_dir, [*KEPT, FEATURES]) if args.process_index == 0 else None
    set_seed(args.seed)
    with args.main_process_first(desc="loading the dataset"):
        watched = args.eval_strategy != "no"
        splits = load_splits(data, args.seed, validate=watched, num_proc=args.dataloader_num_workers or None)
    if not network.plain:
        check_search_split(splits)
    names = splits["train"].features["labels"].names
    model = create_model(network, names)
    processor = create_image_processor(model)
    images = prepare_images(splits, data, args, processor)
    mixes = args.mixup_alpha > 0 or args.cutmix_alpha > 0
    own_teacher = args.distillation_teacher in ("deepest", "ensemble")
    if args.freeze_backbone and data.store_features and own_teacher and not (mixes or augments(data)):
        # The same images in every epoch, and so the same features: the backbone runs over them once.
        features = Path(args.output_dir, FEATURES)
        with args.main_process_first(local=False, desc="features of the frozen stages"):  # on a disk they all see
            if args.process_index == 0:
                shutil.rmtree(features, ignore_errors=True)
                workers = args.dataloader_num_workers
                extract_stage_features(model.to(args.device), images["train"], features, num_workers=workers)
            images["train"] = StageFeatures(features)
    settings: dict[str, Any] = {
        "args": args,
        "train_dataset": images["train"],
        "eval_dataset": images.get("validation"),
        "processing_class": processor,
    }
    # Convolutions are faster with the channels last, on CPUs and GPUs alike.
    if network.plain:
        plain = plain_copy(model).to(memory_format=torch.channels_last)
        callbacks = [EpochCallback(images["train"])]
        trainer: CheckedTrainer = CheckedTrainer(
            plain, compute_metrics=plain_accuracy, callbacks=callbacks, **settings
        )
        trainer.trained_on = model.exit_config.trained_on
    else:
        trainer = ScanTrainer(model.to(memory_format=torch.channels_last), **settings)
    if network.batch_norm_momentum is not None:
        for module in trainer.model.modules():
            if isinstance(module, (torch.nn.BatchNorm2d, BatchNormAct2d)):
                module.momentum = network.batch_norm_momentum
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and checkpoint.lower() in ("true", "last"):
        checkpoint = last_whole_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        shutil.rmtree(Path(args.output_dir, FEATURES), ignore_errors=True)

    if trainer.is_world_process_zero():
        with replaced_folder(args.output_dir, KEPT) as folder:  # nothing that follows can lose the weights
            trainer.model.save_pretrained(folder)
            processor.save_pretrained(folder)
    if "search" in images and not network.plain:
        # The first process searches, all of them score with what it found.
        found: list[Any] = [None]
        if args.process_index == 0:
            table = collect_exit_logits(model, images["search"])
            found = [calibrate(model, table, beta=network.beta, seed=args.seed)]
        model.exit_config = broadcast_object_list(found)[0]
    args.dataloader_drop_last = False  # the Trainer would leave test images out too
    scores = trainer.evaluate(images["test"], metric_key_prefix="test")
    if not trainer.is_world_process_zero():
        return
    scores = {name.removeprefix("test_"): score for name, score in scores.items()}
    facts: dict[str, Any] = {
        "dataset": title(data.dataset_name),
        "splits": {name: len(rows) for name, rows in splits.items()},
        "seed": args.seed,
        "processes": args.world_size,
        "machine": describe_machine(trainer.model.device),
        "recipe": {
            "epochs": trainer.state.epoch,
            "steps": trainer.state.global_step,
            "checkpoint": checkpoint_choice(trainer),
            "images a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "optimizer": OptimizerNames(args.optim).value,
            "learning rate": args.learning_rate,
            "weight decay": args.weight_decay,
            "schedule": SchedulerType(args.lr_scheduler_type).value,
        },
    }
    print(f"\n{len(splits['test'])} test images of {facts['dataset']}, seed {args.seed}")
    if network.plain:
        report: dict[str, Any] = {"accuracy": scores["accuracy"]}
        print(f"plain {network.backbone}: {scores['accuracy']:.2%}")
    else:
        report = exit_report(model, scores, plain_accuracy=plain_accuracy_there)
        facts["recipe"]["distillation"] = distillation_summary(args)
        print("\n".join([exit_table(report), *speedup_lines(report)]))
    with replaced_folder(args.output_dir, KEPT) as folder:
        trainer.model.save_pretrained(folder)
        if network.plain:  # whose weights may get exits later, and keep their provenance
            ExitConfig(trained_on=trainer.trained_on).save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps({**facts, **report}, indent=2) + "\n", encoding="utf-8")
        if isinstance(trainer, ScanTrainer):
            if model.exit_config.search is not None:
                facts |= draw_frontier(model, table, folder)
            name = trainer.hub_model_id or title(args.output_dir)
            source = source_on_the_hub(network.backbone) if network.backbone_weights == "timm" else None
            trainer.card = create_model_card(model, report, facts, name, finetuned_from=source, **metadata(data))
            trainer.card.save(folder / "README.md")
    print(f"Written to {args.output_dir}")
    if not network.plain and any("loss" in entry for entry in trainer.state.log_history):  # or too short to log
        try:
            plot_training(trainer.state.log_history, Path(args.output_dir, "training.png"))
        except ImportError as error:
            print(error)
    if args.push_to_hub:
        print(f"Pushed to {trainer.push_to_hub().repo_url}")
    if lock is not None:
        lock.release()


def draw_frontier(model: ScanForImageClassification, table: ExitTable, folder: Path) -> dict[str, str]:
    """What thresholds can do for this network, for its card; nothing where there is no Matplotlib."""
    config, cost_model = model.exit_config, CostModel.of(model)
    frontier = exit_frontier(table, config, cost_model.cumulative, polish=False)
    search = config.search or {}
    chosen = {"chosen": (search["accuracy"], search["cost"] * cost_model.plain_image)}
    try:
        plot_frontier(frontier, folder / "frontier.png", f"{cost_model.unit} ({table.split} split)", points=chosen)
    except ImportError as error:
        print(error)
        return {}
    return {"frontier": "frontier.png"}


def title(name: str) -> str:
    """What to call a dataset or a model where others read it: a folder of this machine by its own name only."""
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name


def metadata(data: DataArguments) -> dict[str, Any]:
    """What a card says where machines read it: the dataset, if others find it by that name, and the licence."""
    known = {} if Path(data.dataset_name).exists() else {"datasets": [data.dataset_name]}
    return known if data.license is None else {**known, "license": data.license}


def source_on_the_hub(name: str) -> str | None:
    """The repository that timm has the weights of a name from, if it is one."""
    if ":" in name:
        source, _, repository = name.partition(":")
        return repository.partition("@")[0] if source == "hf-hub" else None
    cfg = timm.get_pretrained_cfg(name)
    return None if cfg is None else cfg.hf_hub_id


def checkpoint_choice(trainer: Trainer) -> str:
    """Which weights were tested."""
    if trainer.state.best_model_checkpoint is None or not trainer.args.load_best_model_at_end:
        return "the last"
    metric = trainer.args.metric_for_best_model
    return f"best {metric} on the validation split, step {trainer.state.best_global_step}"


def distillation_summary(args: ScanTrainingArguments) -> str:
    """The terms of the loss, in words."""
    temperature = f"T {args.distillation_temperature}{' with' if args.scale_by_temperature else ' without'} T^2"
    weights = f"label {args.label_weight}, soft label {args.soft_label_weight}, hint {args.hint_weight}"
    return f"{weights}, {temperature}, teacher {title(args.distillation_teacher)}"


if __name__ == "__main__":
    main()
    # A process that leaves while another is still at work can be aborted on its way out.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
