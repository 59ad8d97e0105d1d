# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The engine without PyTorch: it runs an exported folder with NumPy and the sessions of a runtime."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..model.problem_type import for_problem
from ..model.provenance import join_trained_on
from .loading import EXIT_CONFIG_NAME, download, read_config, read_exit_config
from .manifest import ONNX_FOLDER, Manifest
from .numpy_rule import AdaptiveAnswer, ExitSettings, Step, confidence_of, plan_steps
from .routing import Group, answer_with_fallback, check_finite, run_batch
from .saving import save_export, upload_export
from .sessions import Sessions
from .staged_export import finish
from .stream import in_order, numbered, run_stream


NEVER = np.float32(np.inf)
# Arguments of `from_pretrained` for the Hub.
HUB_ARGUMENTS = {"revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"}


@dataclass
class EngineOutput:
    """
    The logits of all exits, as [`ExportedScan`] returns them.

    Args:
        logits (`np.ndarray` of shape `(batch_size, num_labels)`): Logits of the deepest exit.
        exit_logits (`tuple[np.ndarray]`): Logits of each exit, of the same shape, from shallow to deep.
        ensemble_logits (`np.ndarray` of shape `(batch_size, num_labels)`): Their mean.
    """

    logits: Any
    exit_logits: tuple[Any, ...]
    ensemble_logits: Any

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Return the names of the fields."""
        return ["logits", "exit_logits", "ensemble_logits"]


class ExportedScan:
    """
    An exported network with early exits, without PyTorch: what the engines of all runtimes share. It routes samples
    with NumPy and runs graphs in sessions of a runtime. Load [`ORTScanForImageClassification`] or
    [`OVScanForImageClassification`].

    NumPy arrays give NumPy arrays and PyTorch tensors give tensors, so that an engine can be used in place of a
    model: in `pipeline("image-classification", model=engine, image_processor=...)`, and as the model of
    [`~hf_scan.calibrate`], [`~hf_scan.measure_costs`], [`~hf_scan.realised_speedup`] and [`~hf_scan.ExitMonitor`].

    Args:
        folder (`Path`): The export.
        manifest ([`Manifest`]): Its manifest.
        config: Its [`~hf_scan.ScanConfig`], or a namespace with the same values without Transformers.
        exit_config: Its [`~hf_scan.ExitConfig`], or [`ExitSettings`] without PyTorch.
        sessions ([`Sessions`]): Opens and runs its graphs.
    """

    main_input_name = "pixel_values"
    training = False

    def __init__(self, folder: Path, manifest: Manifest, config: Any, exit_config: Any, sessions: Sessions) -> None:
        self.folder, self.manifest, self.config = folder, manifest, config
        self._exit_config = exit_config
        self._sessions = sessions
        self._scratch: Any = None  # holds a folder that was exported for this engine only

    @classmethod
    def _load(
        cls,
        model_id: str | os.PathLike[str],
        sessions: Callable[[Path, Manifest], Sessions],
        export: bool = False,
        subfolder: str = "",
        exit_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load an exported network, whose graphs `sessions(folder, manifest)` opens."""
        if export:
            return cls._exported(model_id, sessions, exit_config, subfolder=subfolder, **kwargs)
        if unknown := sorted(set(kwargs) - HUB_ARGUMENTS):
            raise TypeError(
                f"`from_pretrained` got {unknown}; expected some of {sorted(HUB_ARGUMENTS)}. Settings of the export "
                "need `export=True`."
            )
        folder = Path(model_id, subfolder) if os.path.isdir(model_id) else download(model_id, subfolder, **kwargs)
        finish(Path(model_id))
        finish(folder)
        manifest = Manifest.load(folder / ONNX_FOLDER)
        config = read_config(folder, manifest)
        recorded = read_exit_config(folder)
        given = exit_config is not None
        exit_config = _with_provenance(exit_config, recorded) if given else recorded
        exit_config = for_problem(exit_config, config.problem_type)
        if exit_config.thresholds is not None:
            try:
                exit_config.resolve(manifest.num_exits)
            except ValueError as error:
                if given:
                    raise
                raise ValueError(f"{EXIT_CONFIG_NAME} of {folder} is of another network: {error}") from error
        return cls(folder, manifest, config, exit_config, sessions(folder, manifest))

    @classmethod
    def _exported(cls, model_id: Any, sessions: Any, exit_config: Any, **kwargs: Any) -> Any:
        from ..model.modeling_scan import ScanForImageClassification

        names = ("calibration_dataset", "include_preprocessing", "opset")
        settings = {name: kwargs.pop(name) for name in names if name in kwargs}
        scratch = tempfile.TemporaryDirectory()
        ScanForImageClassification.from_pretrained(model_id, **kwargs).export_onnx(scratch.name, **settings)
        engine = cls._load(scratch.name, sessions, exit_config=exit_config)
        engine._scratch = scratch
        return engine

    # Attributes that code for models expects.

    @property
    def exit_config(self) -> Any:
        """
        The rule by which the network exits: an [`~hf_scan.ExitConfig`], or [`ExitSettings`] without PyTorch.
        Whatever is assigned, its `trained_on` keeps the images that the weights are known to have been trained on.
        """
        return self._exit_config

    @exit_config.setter
    def exit_config(self, exit_config: Any) -> None:
        exit_config = for_problem(exit_config, self.config.problem_type)
        settings = ExitSettings.of(exit_config)
        if settings.thresholds is not None:
            settings.resolve(self.num_exits)
        self._exit_config = _with_provenance(exit_config, self._exit_config)

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return self.manifest.num_exits

    @property
    def counted(self) -> dict[str, Any]:
        """MACs and parameters of each stage and head, as counted at export."""
        return self.manifest.counted

    @property
    def threads(self) -> int:
        """Number of threads that a graph is computed with, as chosen when the engine was loaded."""
        return self._sessions.threads

    @property
    def device(self) -> Any:
        """The device that images must be on: the CPU."""
        return _torch().device("cpu")

    @property
    def dtype(self) -> Any:
        """The dtype of the images."""
        return getattr(_torch(), self.manifest.image["dtype"])

    def to(self, *args: Any, **kwargs: Any) -> "ExportedScan":
        """Return the engine as it is: providers are chosen when it is loaded."""
        return self

    def has_training_modules(self) -> bool:
        """Return `False`: an exported network has no modes."""
        return False

    def eval(self) -> "ExportedScan":
        """Return the engine, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> "ExportedScan":
        """Raise a `ValueError`, unless `mode` is `False`."""
        if mode:
            raise ValueError("An exported network is not trained. Train the checkpoint and export it again.")
        return self

    def can_generate(self) -> bool:
        """Return `False`."""
        return False

    def fingerprint(self) -> str:
        """Return SHA-256 of graphs and weights, by which thresholds are tied to the network they were found for."""
        return self.manifest.fingerprint()

    # Inference.

    def forward(self, pixel_values: Any, labels: Any = None) -> EngineOutput:
        """
        Run every stage and every exit.

        Args:
            pixel_values (`np.ndarray` or `torch.Tensor`): The images.
            labels: Ignored: there is no loss without PyTorch.
        """
        images, convert = self._images(pixel_values)
        state, logits = [images], []
        for index in range(self.num_exits):
            state, answer = self.run(index, state, head=True)
            logits.append(answer)
        found = tuple(convert(one) for one in logits)
        return EngineOutput(found[-1], found, convert(np.mean(np.stack(logits), axis=0)))

    __call__ = forward

    def plain(self, pixel_values: Any) -> Any:
        """Return the logits of the network without early exits, run as one graph."""
        images, convert = self._images(pixel_values)
        return convert(self._sessions["plain.onnx"].run(None, {"pixel_values": images})[0])

    backbone = plain

    def run(self, index: int, state: Sequence[Any], head: bool) -> tuple[list[Any], Any]:
        """
        Run a stage, with or without its head.

        Args:
            index (`int`): Which stage.
            state (`Sequence[np.ndarray]`): The state that the previous stage returned, or `[pixel_values]`.
            head (`bool`): Whether to run the head. The last stage always runs it.

        Returns:
            `tuple[list, np.ndarray]`: the state after the stage, and the exit's logits, or None without the head.
        """
        names = ["pixel_values"] if index == 0 else [value["name"] for value in self.manifest.states[index - 1]]
        head = head or index == self.num_exits - 1
        session = self._sessions[f"stage_{index}.onnx" if head else f"stage_{index}_without_head.onnx"]
        values = session.run(None, dict(zip(names, state)))
        return (values[1:], values[0]) if head else (values, None)

    def time_parts(self, pixel_values: Any) -> list[float]:
        """
        Return the seconds of each stage and its head, in order, and of the plain network. A head runs in the session
        of its stage, so its time is the difference between the stage with the head and without it. All stages run
        without heads first and then all with heads: each finds the caches as a pass through the network leaves them,
        where running a stage twice in a row would make its second run, and so its head, cheaper than it is.
        """
        images = self._images(pixel_values)[0]
        without, with_heads = self._time_pass(images, head=False), self._time_pass(images, head=True)
        # At least a nanosecond: later code divides by it.
        heads = [*(max(1e-9, both - alone) for alone, both in zip(without[:-1], with_heads)), 1e-9]
        start = time.perf_counter()
        self._sessions["plain.onnx"].run(None, {"pixel_values": images})
        plain = time.perf_counter() - start
        return [seconds for pair in zip(without, heads) for seconds in pair] + [plain]

    def _time_pass(self, images: np.ndarray, head: bool) -> list[float]:
        """Return the seconds of each stage in a pass through the network, with or without its heads."""
        state: list[Any] = [images]
        seconds = []
        for index in range(self.num_exits):
            start = time.perf_counter()
            state, logits = self.run(index, state, head)
            if head and index < self.num_exits - 1:
                (confidence_of(logits) > 0.5).any()  # the decision who leaves
            seconds.append(time.perf_counter() - start)
        return seconds

    def predict_adaptive(
        self,
        pixel_values: Any,
        exit_config: Any = None,
        max_exit: int | None = None,
        max_time_ms: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Classify a batch, each sample leaving the network at the first exit that is confident enough, as
        [`~AdaptiveInferenceMixin.predict_adaptive`] does, which explains the arguments.

        Returns:
            [`AdaptiveAnswer`], or [`~hf_scan.AdaptiveOutput`] for tensors.

        Raises:
            `ValueError`: if the images are not what was exported or hold NaN or infinite values, if there are no
                thresholds or the wrong number of them, or if what the network answers is not finite.
        """
        images, convert = self._images(pixel_values, values=True)
        settings = self._settings(exit_config, kwargs)
        plan = plan_steps(settings, self.num_exits, max_exit, every_head=max_time_ms is not None)
        if max_time_ms is not None and not max_time_ms > 0:
            raise ValueError(f"`max_time_ms` is {max_time_ms}; expected a number of milliseconds above 0, or None.")
        nothing_leaves = plan[-1].limit is None and not any(step.runs for step in plan[:-1])
        if nothing_leaves and len(plan) == self.num_exits and max_time_ms is None:
            answer = self._run_plain(images, settings)  # with all exits off it costs what the plain network costs
        elif len(images) == 1 and max_time_ms is None and self.manifest.holds(settings, plan):
            answer = self.run_nested(images, plan)
        else:
            answer = run_batch(self, images, settings, plan, max_time_ms)
        return _converted(answer, convert)

    def predict_adaptive_stream(
        self,
        batches: Any,
        batch_size: int = 64,
        exit_config: Any = None,
        ordered: bool = False,
        max_exit: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """
        Classify a stream of images in full batches, as [`~AdaptiveStreamMixin.predict_adaptive_stream`] does, which
        explains the arguments.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; expected a whole number of at least 1.")
        settings = self._settings(exit_config, kwargs)
        plan = plan_steps(settings, self.num_exits, max_exit)
        converts: list[Any] = [np.asarray]

        def images_of(batch: Any) -> np.ndarray:
            images, converts[0] = self._images(batch, values=True)
            return images

        arrived: list[int] = []

        def answers() -> Iterator[AdaptiveAnswer]:
            source = numbered(batches, images_of, batch_size)
            yield from run_stream(self, settings, plan, source, batch_size, arrived if ordered else None)

        for answer in in_order(answers(), arrived) if ordered else answers():
            yield _converted(answer, converts[0])

    def run_nested(self, images: np.ndarray, plan: list[Step]) -> AdaptiveAnswer:
        """
        Run `adaptive.onnx`. The plan must be of the rule in the file, whose heads all run.

        Args:
            images (`np.ndarray`): One image, as a batch.
            plan (`list[Step]`): Gives the thresholds.
        """
        limits = np.array([NEVER if step.limit is None else step.limit for step in plan], dtype=np.float32)
        session = self._sessions["adaptive.onnx"]
        logits, exit_index, confidence = session.run(None, {"pixel_values": images, "thresholds": limits})
        check_finite(confidence)
        return AdaptiveAnswer(logits, exit_index, confidence)

    def _run_plain(self, images: np.ndarray, settings: ExitSettings) -> AdaptiveAnswer:
        """Answer with the deepest exit, whose logits are the plain network's."""
        logits = self._sessions["plain.onnx"].run(None, {"pixel_values": images})[0]
        group = Group(np.arange(len(images)), [], [logits], [self.num_exits - 1])
        answer = answer_with_fallback(settings, group, self.num_exits)
        return AdaptiveAnswer(answer.logits, answer.exit_index, answer.confidence)

    def open_sessions(self) -> None:
        """
        Open a session for every graph now, rather than each when it is first needed.

        Raises:
            `OSError`: if the runtime does not load one of them.
        """
        self._sessions.open_all()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        Write the export and the exit configuration to a folder, which may be the engine's own. `adaptive.onnx` holds
        the heads that run, criterion, fallback and temperatures, but not the thresholds. Where one of these changed,
        the file is written anew, which needs the package onnx; without it, the file is left out.

        Args:
            save_directory (`str` or `Path`): The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push it to the Hub, too.
            kwargs: For [`~ExportedScan.push_to_hub`].
        """
        target = Path(save_directory)
        save_export(self.folder, self.manifest, self.exit_config, target)
        if target.resolve() == self.folder.resolve():
            self.manifest = self._sessions.manifest = Manifest.load(self.folder / ONNX_FOLDER)
            self._sessions.forget("adaptive.onnx")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Upload the folder in one commit, which removes the graphs of an earlier one.

        Args:
            repo_id (`str`): The repository. It is created when there is none.
            kwargs: `private`, `token`, `revision` (a branch, created when there is none), `subfolder`, and what
                [`~huggingface_hub.HfApi.upload_folder`] takes, such as `commit_message` or `create_pr`.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "export")
            self.save_pretrained(folder)
            return upload_export(folder, repo_id, **kwargs)

    # Helpers.

    def _settings(self, exit_config: Any, changes: dict[str, Any]) -> ExitSettings:
        settings = ExitSettings.of(self._exit_config if exit_config is None else exit_config)
        settings = settings.replace(**changes) if changes else settings
        return for_problem(settings, self.config.problem_type)

    def _images(self, pixel_values: Any, values: bool = False) -> tuple[np.ndarray, Any]:
        """Return the checked images as an array, and the function that converts answers to the type that was given."""
        if hasattr(pixel_values, "detach"):
            images, convert = pixel_values.detach().cpu().numpy(), _torch().from_numpy
        else:
            images, convert = np.asarray(pixel_values), np.asarray
        expected, dtype = list(self.manifest.image["shape"]), self.manifest.image["dtype"]
        if images.ndim != 4 or list(images.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` has shape {images.shape}; expected (batch_size, {', '.join(map(str, expected))}), "
                "which was exported. Prepare images with the folder's image processor, or export another size."
            )
        if images.dtype != dtype:
            raise ValueError(f"`pixel_values` holds {images.dtype}; the exported network takes {dtype}.")
        if len(images) == 0:
            raise ValueError(f"`pixel_values` is empty, of shape {images.shape}; expected at least one image.")
        if values and dtype != "uint8" and not np.isfinite(images.sum(dtype=np.float32)):
            raise ValueError("`pixel_values` holds NaN or infinite values; expected finite ones. Check the images.")
        return images, convert


def _with_provenance(exit_config: Any, before: Any) -> Any:
    """Return an exit configuration that names the images that the weights were trained on, as one before it does."""
    trained_on = join_trained_on(before.trained_on, getattr(exit_config, "trained_on", None))
    if trained_on in (None, getattr(exit_config, "trained_on", None)):
        return exit_config
    return exit_config.replace(trained_on=trained_on)


def _torch() -> Any:
    import torch

    return torch


def _converted(answer: AdaptiveAnswer, convert: Any) -> Any:
    if convert is np.asarray:
        return answer
    from ..model.exit_rule import AdaptiveOutput

    return AdaptiveOutput(**{name: convert(np.ascontiguousarray(value)) for name, value in answer.items()})


__all__ = ["EngineOutput", "ExportedScan"]
