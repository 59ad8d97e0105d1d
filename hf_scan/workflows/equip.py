# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""From a trained classifier and a folder of images to a faster one."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import calibrate
from ..calibration.certify import RiskBound
from ..calibration.exit_table import ExitTable, collect_exit_logits
from ..calibration.splits import check_unseen
from ..costs.allocator import keep_freed_memory
from ..costs.measure import count_macs, describe_machine, measure_costs, realised_speedup
from ..costs.values import MeasuredCosts, RealisedSpeedup
from ..data.columns import split_off
from ..data.datasets import SeededImages
from ..data.transforms import eval_transform, train_transform
from ..model.exit_config import ExitConfig
from ..model.image_processing_scan import create_image_processor
from ..model.modeling_scan import ScanForImageClassification
from ..model.named_errors import reason_of, write_whole
from ..model.weight_files import fingerprint_of
from ..reporting.model_card import create_model_card
from ..reporting.report import exit_report, exit_table, speedup_lines
from ..training.collation import collate_rows
from ..training.output_dirs import lock_output_folder, replaced_folder
from .calibrate_run import score
from .candidates import candidates_of, spread_over
from .data_arguments import DataArguments, check_search_split, load_splits, metadata, title
from .equip_arguments import EquipArguments, Equipped
from .equip_source import check_classes, for_classes, load_source, name_classes
from .linear_probe import fit_classifier
from .part_costs import RUNTIMES, PartCosts, costs_of_parts, serving_runtime
from .recipes import HEADS_RECIPE
from .search_exits import ExitSearch, choose_exits, train_candidates, wide_network
from .steps import Steps
from .time_left import TimeLeft, TrainingProgress, expected_seconds, seconds_of_an_image
from .verdict import MORE_LOST, NOTHING


STEPS = "steps"
RUNTIME_NAMES = {"onnx": "ONNX Runtime", "pytorch": "PyTorch", "macs": "MACs"}
# Images that the speed-up is measured on; each round runs all of them.
TIMED_IMAGES = 100
# Of the heads' learning rate, where the backbone is trained with them: its weights are good already.
FINETUNING_RATE = 0.1
# Candidates of a network that is trained with them: each pulls at the backbone, so that they are few.
JOINT_CANDIDATES = 6


def equip(model: str, data: str, output: str, **settings: Any) -> Equipped:
    """
    Give a trained classifier early exits: place them, train their heads, find thresholds for what may be lost,
    measure, export and document it. A run that was interrupted goes on where it stopped when it is started again.

    Args:
        model, data, output (`str`): As in [`EquipArguments`], a model of timm or torchvision, a folder of
            images and one to write to.
        settings: The other fields of [`EquipArguments`], such as `weights` and `max_accuracy_drop`.

    Returns:
        [`Equipped`]: four lines when printed.

    Raises:
        `ValueError`: if an argument is out of range, or model, weights and images do not go together.
        `FileExistsError`: if `output` holds something else, or another run writes to it.
    """
    return run_equip(EquipArguments(model=model, data=data, output=output, **settings))


def run_equip(arguments: EquipArguments) -> Equipped:
    """As [`equip`], of an object of arguments."""
    _check_arguments(arguments)
    if arguments.runtime == "macs":
        raise ValueError("`runtime` is 'macs', which serves nothing; expected 'onnx' or 'pytorch'.")
    keep_freed_memory()
    lock = lock_output_folder(arguments.output, [STEPS])
    try:
        return _Run(arguments).run()
    finally:
        lock.release()


def place_exits(arguments: EquipArguments) -> ExitSearch:
    """
    Do the first steps of [`equip`] only: tell where exits pay, without training them to the end.

    Args:
        arguments ([`EquipArguments`]): As for [`equip`]; `output` keeps what was done, to go on from.
    """
    _check_arguments(arguments)
    keep_freed_memory()
    run = _Run(arguments)
    run.start("plain", "search")
    run.prepare_plain()
    return run.place_exits()


def _check_arguments(arguments: EquipArguments) -> None:
    if arguments.runtime not in (None, *RUNTIMES):
        raise ValueError(f"`runtime` is {arguments.runtime!r}; expected one of {list(RUNTIMES)}.")
    if arguments.max_exits < 1:
        raise ValueError(f"`max_exits` is {arguments.max_exits}; expected a whole number of at least 1.")
    if not 0 <= arguments.max_accuracy_drop <= 100:
        raise ValueError(f"`max_accuracy_drop` is {arguments.max_accuracy_drop}; expected points, such as 0.5.")
    if not 0 < arguments.holdout < 1:
        raise ValueError(f"`holdout` is {arguments.holdout}; expected a share between 0 and 1.")
    if min(arguments.search_epochs, arguments.epochs) < 0 or arguments.search_epochs == 0:
        raise ValueError(
            f"`search_epochs` is {arguments.search_epochs} and `epochs` {arguments.epochs}; expected numbers above 0 "
            "and of at least 0."
        )
    if arguments.guarantee is not None:
        RiskBound(arguments.guarantee, arguments.delta)


class _Run:
    """One run of [`equip`]: a method for each step, and what they hand on."""

    def __init__(self, arguments: EquipArguments) -> None:
        print(f"Reading {title(arguments.model)} and the images of {title(arguments.data)}", flush=True)
        self.arguments = arguments
        self.runtime = arguments.runtime or serving_runtime()
        # The network comes first: a name or a file that does not exist is refused before images are read.
        source = load_source(arguments)
        data = DataArguments(dataset_name=arguments.data, holdout=arguments.holdout)
        self.splits = load_splits(data, arguments.seed, validate=False)
        check_search_split(self.splits)
        if arguments.guarantee is not None:
            self.splits["search"], self.splits["certify"] = split_off(self.splits["search"], 0.5, arguments.seed)
        try:
            for name in sorted(self.splits.keys() - {"train"}):
                check_unseen(self.splits[name], name, source.exit_config.trained_on, "The network was trained")
        except ValueError as error:
            raise ValueError(f"{error} The `holdout` of that training keeps the same ones.") from None
        names = self.splits["train"].features["labels"].names
        self.new_classes = source.num_labels != len(names)
        self.plain = for_classes(source, names) if self.new_classes else source
        self.processor = create_image_processor(self.plain)
        if not self.new_classes:
            name_classes(self.plain, names)
        self.left = TimeLeft({})
        self.steps = Steps(Path(arguments.output, STEPS), 0)
        self.plain_search: ExitTable | None = None  # what the plain network answers, where another is made of it

    def run(self) -> Equipped:
        self.start("plain", "search", "joint" if self.arguments.finetune else "train", "costs", "finish")
        self.prepare_plain()
        search = self.place_exits()
        if self.arguments.finetune:
            search = self.train_jointly(search)
        if not search.exit_points:
            return self.give_up(search)
        model = search.create_model().eval() if self.arguments.finetune else self.train_heads(search)
        engine = self.measure(model)
        return self.finish(model, engine, search)

    def start(self, *steps: str) -> None:
        """Print what images there are, and estimate the time of these steps by training on a few."""
        counts = self.count_images()
        print(f"{', '.join(f'{count:,} {name}' for name, count in counts.items())} images", flush=True)
        seconds = seconds_of_an_image(self.wide_network(), self.images("train", augmented=True))
        expected = expected_seconds(self.arguments, counts, seconds, self.new_classes)
        self.left = self.steps.left = TimeLeft({step: expected[step] for step in steps})
        self.steps.count = len(steps)
        print(f"This takes {self.left.text()}: {seconds:.3f} s to read a train image and learn from it", flush=True)

    def count_images(self) -> dict[str, int]:
        """Return the number of images by split."""
        return {name: len(rows) for name, rows in self.splits.items()}

    def images(self, split: str, augmented: bool = False) -> Any:
        """Return a split as the network takes it."""
        rows = self.splits[split]
        if not augmented:
            return rows.with_transform(eval_transform(self.processor))
        transformed = rows.with_transform(train_transform(self.processor, crop=self.crop))
        return SeededImages(transformed, self.arguments.seed)

    @property
    def crop(self) -> str:
        """How train images are cropped: boldly only where there is much to learn."""
        return "resized" if self.arguments.finetune else "pad"

    def prepare_plain(self) -> None:
        """Fit a new classifier where the weights are of other classes than the images."""
        arguments, file = self.arguments, self.steps.folder / "plain.pt"
        settings = {name: getattr(arguments, name) for name in ("model", "weights", "image_size", "data", "seed")}
        settings |= {"images": self.count_images(), "fingerprint": None}
        if not self.new_classes:
            # Of the backbone alone: the exits that the network was built with are random, and are not used.
            settings["fingerprint"] = fingerprint_of(sorted(self.plain.backbone.state_dict().items()))

        def work() -> dict[str, Any]:
            accuracy = None
            if self.new_classes:
                accuracy = fit_classifier(self.plain, self.images("train"), num_workers=arguments.workers)
                print(f"      {accuracy:.2%} of images that were held out are right", flush=True)
            else:
                check_classes(self.plain, self.images("train"), arguments)
            torch.save(self.plain.backbone.state_dict(), file)
            return {"held_out_accuracy": accuracy}

        fit = f"Fit a classifier for {self.plain.num_labels} classes, which the weights do not know"
        self.steps.run("plain", fit if self.new_classes else "Take the network as it is", settings, work, file)
        _load_step(self.plain.backbone, file)

    def wide_network(self) -> ScanForImageClassification:
        """Return the network with fresh heads at all candidates."""
        arguments = self.arguments
        wide = wide_network(self.plain, arguments.max_exits, arguments.exit_points, arguments.seed)
        if not arguments.finetune or len(wide.exit_heads) <= JOINT_CANDIDATES:
            return wide
        points = spread_over([stage.name for stage in wide.stages[:-1]], count_macs(wide).stages, JOINT_CANDIDATES)
        return wide_network(self.plain, arguments.max_exits, points, arguments.seed)

    def place_exits(self) -> ExitSearch:
        """Train the heads of all candidates, measure costs once, and choose."""
        arguments, folder = self.arguments, self.steps.folder / "search"
        wide = self.wide_network()
        names = ("search_epochs", "batch_size", "max_exits", "finetune", "serve_batch_size")
        settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
        settings |= {"exit_points": wide.config.exit_points, "guarantee": arguments.guarantee is not None}
        settings |= {"runtime": self.runtime}
        images = self.images("train", augmented=True)

        def work() -> dict[str, Any]:
            progress = TrainingProgress(self.left, "search")
            train_candidates(
                wide, images, folder, resumable=True, progress=progress, **self.training(arguments.search_epochs)
            )
            collect_exit_logits(wide.eval(), self.images("search")).save(folder / "table.safetensors")
            print(f"      measuring what stages and heads cost in {RUNTIME_NAMES[self.runtime]}", flush=True)
            costs = costs_of_parts(wide, self.runtime, arguments.serve_batch_size)
            wide.save_pretrained(folder / "model")
            _remove_checkpoints(folder)
            return {"costs": costs.to_dict()}

        candidates, count = len(wide.exit_heads), len(self.splits["train"])
        what = f"Place exits: {candidates} candidates, {arguments.search_epochs:g} epochs of {count:,} images"
        found = self.steps.run("search", what, settings, work, folder / "model")
        self.costs = PartCosts.from_dict(found["costs"])
        return self.choose(folder)

    def choose(self, folder: Path, plain: ExitTable | None = None) -> ExitSearch:
        """Choose among the candidates of a network in a folder, which may have been trained with them."""
        arguments = self.arguments
        wide = ScanForImageClassification.from_pretrained(folder / "model").eval()
        table = ExitTable.load(folder / "table.safetensors")
        dropped: dict[str, str] = {}
        if arguments.exit_points is None:
            places, tried = candidates_of(self.plain), wide.config.exit_points
            reason = f"since {len(tried)} are trained with the network, evenly over its cost"
            dropped = places.dropped | {name: reason for name in places.names if name not in tried}
        limits = (arguments.max_exits, arguments.max_accuracy_drop)
        search = choose_exits(wide, table, self.costs, *limits, dropped, plain)
        print(search, flush=True)
        return search

    def training(self, epochs: float) -> dict[str, Any]:
        """Return arguments of every training."""
        arguments = self.arguments
        return {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": arguments.batch_size,
            "dataloader_num_workers": arguments.workers,
            "seed": arguments.seed,
        }

    def train_heads(self, search: ExitSearch) -> ScanForImageClassification:
        """Train the chosen heads further."""
        arguments, folder = self.arguments, self.steps.folder / "train"
        settings = {name: getattr(arguments, name) for name in ("epochs", "learning_rate")}
        settings |= {"exit_points": search.exit_points}

        def work() -> dict[str, Any]:
            model = search.create_model()
            if arguments.epochs:
                self.train(model, folder, learning_rate=arguments.learning_rate or HEADS_RECIPE["learning_rate"])
            model.save_pretrained(folder / "model")
            return {}

        what = f"Train the heads at {', '.join(search.exit_points)}, {arguments.epochs:g} epochs"
        self.steps.run("train", what, settings, work, folder / "model")
        return ScanForImageClassification.from_pretrained(folder / "model").eval()

    def train_jointly(self, search: ExitSearch) -> ExitSearch:
        """
        Train the whole network with all candidates, whose heads have been trained, and choose among them anew: exits
        that were too weak on the network as it was are lifted most.
        """
        arguments, folder = self.arguments, self.steps.folder / "joint"
        settings = {name: getattr(arguments, name) for name in ("epochs", "learning_rate")}

        def work() -> dict[str, Any]:
            rate = HEADS_RECIPE["learning_rate"]
            if arguments.epochs:
                self.train(
                    search.model,
                    folder,
                    freeze_backbone=False,
                    learning_rate=arguments.learning_rate or FINETUNING_RATE * rate,
                    head_learning_rate=rate,
                    distillation_preset="best",
                )
            collect_exit_logits(search.model.eval(), self.images("search")).save(folder / "table.safetensors")
            search.model.save_pretrained(folder / "model")
            return {}

        what = f"Train the network with {len(search.model.exit_heads)} exits, {arguments.epochs:g} epochs"
        self.steps.run("joint", what, settings, work, folder / "model")
        self.plain_search = search.table
        return self.choose(folder, search.table)

    def train(self, model: ScanForImageClassification, folder: Path, **settings: Any) -> None:
        """Train a network with exits on the train images."""
        train_candidates(
            model.to(memory_format=torch.channels_last),
            self.images("train", augmented=True),
            folder,
            resumable=True,
            progress=TrainingProgress(self.left, folder.name),
            **{**self.training(self.arguments.epochs), **settings},
        )
        _remove_checkpoints(folder)

    def measure(self, model: ScanForImageClassification) -> Any:
        """Export where ONNX Runtime will serve, and measure what the parts cost there."""
        arguments, folder = self.arguments, self.steps.folder / "onnx"
        onnx = self.runtime == "onnx"
        engine: Any = None if onnx else model.to(memory_format=torch.channels_last)

        def load() -> Any:
            from ..runtime.onnx_runtime import ORTScanForImageClassification, threaded_options

            options = threaded_options(torch.get_num_threads())
            return ORTScanForImageClassification.from_pretrained(folder, session_options=options)

        def work() -> dict[str, Any]:
            if onnx:
                shutil.rmtree(folder, ignore_errors=True)
                model.export_onnx(folder)
            measured = measure_costs(load() if onnx else engine, arguments.serve_batch_size)
            return {"costs": measured.to_dict()}

        what = "Export to ONNX and measure what exits cost there" if onnx else "Measure what exits cost"
        settings = {"fingerprint": model.fingerprint(), "serve_batch_size": arguments.serve_batch_size}
        costs = self.steps.run("costs", what, settings, work, folder if onnx else None)["costs"]
        model.exit_config = model.exit_config.replace(costs=MeasuredCosts.from_dict(costs))
        return load() if onnx else engine

    def finish(self, model: ScanForImageClassification, engine: Any, search: ExitSearch) -> Equipped:
        """Find thresholds, test, and write everything."""
        arguments = self.arguments
        self.steps.number += 1
        self.steps.announce("Find thresholds, test and write")
        self.find_thresholds(model, search.accuracy_margin)
        scores = score(model, collect_exit_logits(model, self.images("test"), "test"))
        plain_accuracy = scores["accuracy"]
        if self.plain_search is not None:
            tested = collect_exit_logits(self.plain.eval(), self.images("test"), "test")
            plain_accuracy = float((tested.deepest == tested.labels).mean())
        engine.exit_config = model.exit_config
        if engine is not model:
            engine.save_pretrained(engine.folder)  # so that one file answers a single image by this rule
        count = min(TIMED_IMAGES, len(self.splits["test"]))
        timed = self.splits["test"].shuffle(seed=arguments.seed).select(range(count))
        pixels = collate_rows(list(timed.with_transform(eval_transform(self.processor))))["pixel_values"]
        if engine is model:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        measured = realised_speedup(engine, pixels, arguments.serve_batch_size)
        report = exit_report(model, scores, [measured], plain_accuracy=plain_accuracy)
        print("\n".join([exit_table(report), *speedup_lines(report)]), flush=True)
        result = Equipped(
            plain_accuracy=plain_accuracy,
            accuracy=scores["adaptive_accuracy"],
            speedup=measured.speedup,
            runtime=f"{RUNTIME_NAMES[self.runtime]}, batch size {arguments.serve_batch_size}",
            output=arguments.output,
            next_step=_next_step(arguments, search, measured, plain_accuracy - scores["adaptive_accuracy"]),
        )
        self.write(model, engine, search, report, result)
        return result

    def find_thresholds(self, model: ScanForImageClassification, accuracy_margin: float) -> None:
        """
        Find thresholds for the target, and certify them if asked. The images that find them have chosen the exits, so
        that they need a larger margin; those that certify have chosen nothing.
        """
        arguments = self.arguments
        table = collect_exit_logits(model, self.images("search"))
        target: dict[str, Any] = {"max_accuracy_drop": arguments.max_accuracy_drop}
        fallbacks: list[Any] = ["deepest"]
        if self.plain_search is not None:
            # The network is another one now. What must not be lost is the accuracy of the one that was brought; and
            # exits that were trained together add up to an ensemble, which those of a frozen backbone do not.
            plain = float((self.plain_search.deepest == self.plain_search.labels).mean())
            target = {"min_accuracy": plain - arguments.max_accuracy_drop / 100}
            fallbacks.append("ensemble")
        found: list[ExitConfig] = []
        for fallback in fallbacks:
            try:
                found.append(
                    calibrate(
                        model,
                        table,
                        batch_size=arguments.serve_batch_size,
                        fallback=fallback,
                        accuracy_margin=accuracy_margin,
                        **target,
                    )
                )
            except ValueError:
                if fallback is fallbacks[-1] and not found:
                    raise
        best = min(found, key=lambda config: (config.search or {})["cost"])
        if arguments.guarantee is not None:
            # Certified once, by a fallback that other images chose: the better of two certificates is none.
            best = calibrate(
                model,
                table,
                batch_size=arguments.serve_batch_size,
                fallback=best.fallback,
                guarantee=RiskBound(arguments.guarantee, arguments.delta),
                certify_dataset=collect_exit_logits(model, self.images("certify"), "certify"),
                **target,
            )
        model.exit_config = best

    def write(
        self, model: ScanForImageClassification, engine: Any, search: ExitSearch, report: Any, result: Equipped
    ) -> None:
        """Put the output folder in place: weights, thresholds, figures, pictures, card and export."""
        arguments = self.arguments
        facts: dict[str, Any] = {
            "dataset": title(arguments.data),
            "splits": self.count_images(),
            "seed": arguments.seed,
            "machine": describe_machine(model.device),
            "recipe": {
                "backbone": "trained with the heads" if arguments.finetune else "frozen",
                "epochs": f"{arguments.search_epochs:g} with all candidates, {arguments.epochs:g} with those chosen",
            },
        }
        with replaced_folder(arguments.output, [STEPS]) as folder:
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            if engine is not model:
                shutil.copytree(Path(engine.folder, "onnx"), folder / "onnx")
            written = {**facts, **report, "placement": search.to_dict(), "result": result.to_dict()}
            (folder / "metrics.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            _draw(search, folder / "placement.png")
            known = metadata(DataArguments(dataset_name=arguments.data))
            create_model_card(model, report, facts, title(arguments.output), **known).save(folder / "README.md")

    def give_up(self, search: ExitSearch) -> Equipped:
        """Say that exits do not pay, and leave what was found."""
        folder = self.steps.folder
        write_whole(folder / "placement.json", json.dumps(search.to_dict(), indent=2) + "\n")
        _draw(search, folder / "placement.png")
        table = collect_exit_logits(search.model, self.images("test"), "test")
        accuracy = float((table.deepest == table.labels).mean())
        return Equipped(
            plain_accuracy=accuracy,
            accuracy=accuracy,
            speedup=1.0,
            runtime="no runtime, since no exit pays,",
            output=f"{folder} (what the search found; there is no faster network)",
            next_step=f"{search.verdict.reason} Deploy the plain network, or try a larger `max_accuracy_drop`"
            f"{'' if self.arguments.finetune else ', or `finetune`'}.",
        )


def _load_step(backbone: nn.Module, file: Path) -> None:
    try:
        backbone.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:  # of pickle, zip files and shapes, which have many kinds
        raise OSError(
            f"{file} of an earlier run cannot be loaded ({reason_of(error)}). Remove {file.parent} to begin anew."
        ) from error


def _next_step(arguments: EquipArguments, search: ExitSearch, measured: RealisedSpeedup, lost: float) -> str:
    if measured.speedup < NOTHING:
        return (
            f"exits do not pay here: {measured.speedup:.2f}x measured, where {search.speedup:.2f}x was expected. "
            "Deploy `model.backbone`, allow a larger `max_accuracy_drop`, or try `finetune`."
        )
    if 100 * lost > arguments.max_accuracy_drop + MORE_LOST:
        return (
            f"more was lost on the test images than the {arguments.max_accuracy_drop:g} points that thresholds may "
            f"lose, as {len(search.table)} search images show so small a loss only roughly. Give more images or a "
            "larger `holdout`, allow less, or set `guarantee`, which is certified."
        )
    return f"try it with `hf-scan predict {arguments.output} photo.jpg`; README.md there shows how to use it in code."


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _draw(search: ExitSearch, path: Path) -> None:
    try:
        search.plot(path)
    except ImportError as error:
        print(error)


__all__ = ["STEPS", "equip", "run_equip"]
