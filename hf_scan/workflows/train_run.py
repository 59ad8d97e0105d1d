# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A training run, from arguments to a finished folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from transformers import Trainer, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..calibration.calibrate import calibrate
from ..calibration.exit_frontier import exit_frontier
from ..calibration.exit_table import ExitTable, collect_exit_logits
from ..costs.cost_model import CostModel
from ..costs.measure import describe_machine
from ..data.datasets import EpochCallback
from ..extras import require_extra
from ..model.exit_config import ExitConfig
from ..model.image_processing_scan import create_image_processor
from ..model.modeling_scan import ScanForImageClassification
from ..reporting.model_card import create_model_card
from ..reporting.plotting import plot_frontier, plot_training
from ..reporting.report import exit_report, exit_table, speedup_lines
from ..reporting.saved_frontier import SavedFrontier
from ..training.baseline import plain_accuracy, plain_copy
from ..training.checkpoints import CheckedTrainer
from ..training.output_dirs import last_whole_checkpoint, lock_output_folder, named_full_disk, replaced_folder
from ..training.stage_features import StageFeatures, extract_stage_features
from ..training.trainer import ScanTrainer
from ..training.training_args import ScanTrainingArguments
from .calibrate_run import images_to_time, judge
from .data_arguments import DataArguments, augments, check_search_split, load_splits, metadata, prepare_images, title
from .json_files import read_json
from .model_arguments import ModelArguments, check_network, create_model, source_on_the_hub


try:
    from accelerate.utils import broadcast_object_list
    from datasets import DatasetDict
except ImportError:
    require_extra("train", "`hf_scan.workflows.train_run`")
    raise

# What `Trainer` writes while it runs.
KEPT = ("checkpoint-*", "runs")
# Where features of a frozen backbone are while the heads are trained.
FEATURES = "features"


def run_training(data: DataArguments, network: ModelArguments, args: ScanTrainingArguments) -> dict[str, Any] | None:
    """
    Train a network, find its thresholds, test it, and write it with its card. Runs in every process of a launcher.

    Args:
        data ([`DataArguments`]): The images.
        network ([`ModelArguments`]): The network.
        args ([`ScanTrainingArguments`]): How to train, and `output_dir`, which is replaced as a whole.

    Returns:
        `dict[str, Any]`, *optional*: what `metrics.json` holds; `None` in other processes than the first.

    Raises:
        `ValueError`: if arguments contradict each other, or images, network or splits are not what they need.
        `FileExistsError`: if `output_dir` holds something else, or another run writes to it.
    """
    _check_arguments(data, network, args)
    known = None if network.plain_metrics is None else _plain_accuracy(network.plain_metrics)
    lock = lock_output_folder(args.output_dir, [*KEPT, FEATURES]) if args.process_index == 0 else None
    set_seed(args.seed)
    check_network(network)
    with args.main_process_first(desc="loading the dataset"):
        watched = args.eval_strategy != "no"
        splits = load_splits(data, args.seed, validate=watched, num_proc=args.dataloader_num_workers or None)
    if not network.plain:
        check_search_split(splits)
    model = create_model(network, splits["train"].features["labels"].names)
    processor = create_image_processor(model)
    images = prepare_images(splits, data, args, processor)
    if args.freeze_backbone and data.store_features and _same_in_every_epoch(data, args):
        images["train"] = _stored_features(model, images["train"], args)
    trainer = _create_trainer(model, network, args, images, processor)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and checkpoint.lower() in ("true", "last"):
        checkpoint = last_whole_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        shutil.rmtree(Path(args.output_dir, FEATURES), ignore_errors=True)
        with replaced_folder(args.output_dir, KEPT) as folder:  # nothing that follows can lose the weights
            trainer.model.save_pretrained(folder)
            processor.save_pretrained(folder)
    table = None
    if "search" in images and not network.plain:
        table = _search(model, network, args, images["search"])
    args.dataloader_drop_last = False  # the Trainer would leave test images out too
    scores = trainer.evaluate(images["test"], metric_key_prefix="test")
    if not trainer.is_world_process_zero():
        return None
    scores = {name.removeprefix("test_"): score for name, score in scores.items()}
    if known is None and args.freeze_backbone:  # whose deepest exit is the plain network, to the bit
        known = scores["accuracy"]
    facts = _facts(data, args, trainer, splits)
    print(f"\n{len(splits['test'])} test images of {facts['dataset']}, seed {args.seed}")
    if network.plain:
        report: dict[str, Any] = {"accuracy": scores["accuracy"]}
        print(f"plain {model.config.backbone}: {scores['accuracy']:.2%}")
    else:
        report = exit_report(model, scores, plain_accuracy=known)
        facts["recipe"]["distillation"] = distillation_summary(args)
        print("\n".join([exit_table(report), *speedup_lines(report)]))
        if "adaptive_accuracy" in scores:  # or there were no images to find thresholds on
            verdict = judge(model.eval(), scores, images_to_time(images["test"]))
            report["verdict"] = verdict.to_dict()
            print(verdict)
    _write(data, network, trainer, report, facts, table)
    if args.push_to_hub:
        print(f"Pushed to {trainer.push_to_hub().repo_url}")
    if lock is not None:
        lock.release()
    return {**facts, **report}


def _plain_accuracy(path: str) -> float:
    """Return the accuracy in the `metrics.json` of a run with `--plain`."""
    accuracy = read_json(path, "the `metrics.json` of a run with `--plain`").get("accuracy")
    if not isinstance(accuracy, (int, float)):
        raise ValueError(f"{path} holds no `accuracy`; expected the `metrics.json` of a run with `--plain`.")
    return accuracy


def _check_arguments(data: DataArguments, network: ModelArguments, args: ScanTrainingArguments) -> None:
    if args.eval_strategy != "no" and not data.holdout:
        raise ValueError("`--eval_strategy` needs images that are not trained on; set `--holdout` above 0.")
    if network.plain and (args.mixup_alpha or args.cutmix_alpha or args.freeze_backbone):
        raise ValueError(
            "`--plain` trains with a stock `Trainer`, which mixes no images and freezes nothing; leave out "
            "`--mixup_alpha`, `--cutmix_alpha` and `--freeze_backbone`."
        )
    if args.freeze_backbone and network.backbone_weights is None:
        raise ValueError("`--freeze_backbone` is for a trained backbone; name its weights with `--backbone_weights`.")
    if (network.max_accuracy_drop, network.guarantee) != (None, None) and not data.holdout and not data.search_split:
        raise ValueError(
            "`--max_accuracy_drop` and `--guarantee` need images to search thresholds on; set `--holdout` above 0, or "
            "name a `--search_split`."
        )
    network.target(args.seed)  # refuses what no guarantee can be


def _same_in_every_epoch(data: DataArguments, args: ScanTrainingArguments) -> bool:
    """Return whether images, and so the features of a frozen backbone, stay the same while heads are trained."""
    mixes = args.mixup_alpha > 0 or args.cutmix_alpha > 0
    own_teacher = args.distillation_teacher in ("deepest", "ensemble")
    return own_teacher and not (mixes or augments(data))


def _stored_features(model: ScanForImageClassification, images: Any, args: ScanTrainingArguments) -> StageFeatures:
    features = Path(args.output_dir, FEATURES)
    with args.main_process_first(local=False, desc="features of the frozen stages"):  # on a disk they all see
        if args.process_index == 0:
            shutil.rmtree(features, ignore_errors=True)
            workers = args.dataloader_num_workers
            extract_stage_features(model.to(args.device), images, features, num_workers=workers)
        return StageFeatures(features)


def _create_trainer(
    model: ScanForImageClassification,
    network: ModelArguments,
    args: ScanTrainingArguments,
    images: dict[str, Any],
    processor: BaseImageProcessor,
) -> CheckedTrainer:
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
        trainer = CheckedTrainer(plain, compute_metrics=plain_accuracy, callbacks=callbacks, **settings)
        trainer.trained_on = model.exit_config.trained_on
    else:
        trainer = ScanTrainer(model.to(memory_format=torch.channels_last), **settings)
    if network.batch_norm_momentum is not None:
        for module in trainer.model.modules():
            if isinstance(module, (torch.nn.BatchNorm2d, BatchNormAct2d)):
                module.momentum = network.batch_norm_momentum
    return trainer


def _search(
    model: ScanForImageClassification, network: ModelArguments, args: ScanTrainingArguments, images: Any
) -> ExitTable | None:
    """Find thresholds in the first process, and give them to all, which score with them."""
    found: list[Any] = [None]
    table = None
    if args.process_index == 0:
        table = collect_exit_logits(model, images)
        fallback: Any = network.fallback or ("deepest" if args.freeze_backbone else "ensemble")
        found = [calibrate(model, table, fallback=fallback, **network.target(args.seed))]
    model.exit_config = broadcast_object_list(found)[0]
    return table


def _facts(
    data: DataArguments, args: ScanTrainingArguments, trainer: CheckedTrainer, splits: DatasetDict
) -> dict[str, Any]:
    return {
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


def _write(
    data: DataArguments,
    network: ModelArguments,
    trainer: CheckedTrainer,
    report: dict[str, Any],
    facts: dict[str, Any],
    table: ExitTable | None,
) -> None:
    """Put the folder in place: weights, figures, pictures and card."""
    args, model = trainer.args, trainer.model
    with replaced_folder(args.output_dir, KEPT) as folder:
        model.save_pretrained(folder)
        if network.plain:  # whose weights may get exits later, and keep their provenance
            ExitConfig(trained_on=trainer.trained_on).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps({**facts, **report}, indent=2) + "\n", encoding="utf-8")
        if isinstance(trainer, ScanTrainer):
            if table is not None:
                facts |= draw_frontier(model, table, folder)
            name = trainer.hub_model_id or title(args.output_dir)
            source = source_on_the_hub(network.name) if network.backbone_weights == "timm" else None
            trainer.card = create_model_card(model, report, facts, name, finetuned_from=source, **metadata(data))
            trainer.card.save(folder / "README.md")
    print(f"Written to {args.output_dir}")
    if not network.plain and any("loss" in entry for entry in trainer.state.log_history):  # or too short to log
        picture = Path(args.output_dir, "training.png")
        try:
            with named_full_disk(picture, "all else is in place"):
                plot_training(trainer.state.log_history, picture)
        except (ImportError, OSError) as error:
            print(error)


def draw_frontier(model: ScanForImageClassification, table: ExitTable, folder: Path) -> dict[str, str]:
    """Write what thresholds can do for this network, and draw it for its card where there is Matplotlib."""
    config, cost_model = model.exit_config, CostModel.of(model)
    frontier = exit_frontier(table, config, cost_model.cumulative, polish=False)
    SavedFrontier.of(table, config, cost_model, frontier).save(folder)
    search = config.search or {}
    chosen = {"chosen": (search["accuracy"], search["cost"] * cost_model.plain_image)}
    try:
        plot_frontier(frontier, folder / "frontier.png", f"{cost_model.unit} ({table.split} split)", points=chosen)
    except ImportError as error:
        print(error)
        return {}
    return {"frontier": "frontier.png"}


def checkpoint_choice(trainer: Trainer) -> str:
    """Return which weights were tested."""
    if trainer.state.best_model_checkpoint is None or not trainer.args.load_best_model_at_end:
        return "the last"
    metric = trainer.args.metric_for_best_model
    return f"best {metric} on the validation split, step {trainer.state.best_global_step}"


def distillation_summary(args: ScanTrainingArguments) -> str:
    """Return the terms of the loss, in words."""
    temperature = f"T {args.distillation_temperature}{' with' if args.scale_by_temperature else ' without'} T^2"
    weights = f"label {args.label_weight}, soft label {args.soft_label_weight}, hint {args.hint_weight}"
    return f"{weights}, {temperature}, teacher {title(str(args.distillation_teacher))}"


__all__ = ["FEATURES", "KEPT", "checkpoint_choice", "distillation_summary", "draw_frontier", "run_training"]
