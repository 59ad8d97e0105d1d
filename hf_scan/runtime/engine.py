# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The engine without PyTorch: NumPy, ONNX Runtime and an exported folder are all that it needs."""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from .manifest import MANIFEST_NAME, ONNX_FOLDER, WEIGHTS_NAME, Manifest, check_weights_beside
from .numpy_rule import RULE, AdaptiveAnswer, ExitSettings, Step, confidence_of, fall_back, plan_steps
from .stream import Group, in_order, numbered, run_stream


CONFIG_NAME = "config.json"
EXIT_CONFIG_NAME = "exit_config.json"
NEVER = np.float32(np.inf)


@dataclass
class EngineOutput:
    """
    What [`ORTScanForImageClassification`] returns for all exits.

    Args:
        logits (`np.ndarray` of shape `(batch_size, num_labels)`): The deepest exit's.
        exit_logits (`tuple[np.ndarray]`): One of the same shape per exit, from shallow to deep.
        ensemble_logits (`np.ndarray` of shape `(batch_size, num_labels)`): Mean over the exits.
    """

    logits: Any
    exit_logits: tuple[Any, ...]
    ensemble_logits: Any

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Return the names of the fields."""
        return ["logits", "exit_logits", "ensemble_logits"]


class ORTScanForImageClassification:
    """
    An exported network with early exits, run by ONNX Runtime: [`~ScanForImageClassification.predict_adaptive`] without
    PyTorch. Made by [`~ORTScanForImageClassification.from_pretrained`].

    Arrays of NumPy give arrays of NumPy, and tensors of PyTorch give tensors, so that an engine can stand where a
    model does: in `pipeline("image-classification", model=engine, image_processor=...)`, and as the model of
    [`~hf_scan.calibrate`], [`~hf_scan.measure_costs`], [`~hf_scan.realised_speedup`] and [`~hf_scan.ExitMonitor`].

    One image runs `adaptive.onnx`, larger batches stage by stage. Each session has a thread pool of its own; where
    several threads are used, [`share_thread_pool`] gives all one.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.runtime import ORTScanForImageClassification

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> model.export_onnx("exported")
    >>> engine = ORTScanForImageClassification.from_pretrained("exported")
    >>> answer = engine.predict_adaptive(np.zeros((4, 3, 32, 32), np.float32), thresholds=[0.9, 0.9])
    >>> answer.logits.shape
    (4, 10)
    ```
    """

    main_input_name = "pixel_values"
    training = False

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: Any,
        exit_config: Any,
        providers: list[Any],
        session_options: Any = None,
    ) -> None:
        self.folder, self.manifest, self.config = folder, manifest, config
        self.providers, self.session_options = providers, session_options
        self._exit_config = exit_config
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._scratch: Any = None  # holds a folder that was exported for this engine only

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        export: bool = False,
        provider: str = "CPUExecutionProvider",
        providers: Sequence[Any] | None = None,
        provider_options: dict[str, Any] | None = None,
        session_options: Any = None,
        subfolder: str = "",
        exit_config: Any = None,
        **kwargs: Any,
    ) -> "ORTScanForImageClassification":
        """
        Load an exported network, with the arguments of Optimum's `ORTModel`.

        Args:
            model_id (`str` or `Path`): A folder that `model.export_onnx` made, or a repository on the Hub.
            export (`bool`, *optional*, defaults to `False`): Whether it is a checkpoint of PyTorch to export first.
            provider (`str`, *optional*, defaults to `"CPUExecutionProvider"`): The execution provider.
            providers (`Sequence`, *optional*): Several, in order of preference, instead.
            provider_options (`dict`, *optional*): Options of `provider`.
            session_options (`onnxruntime.SessionOptions`, *optional*): Of every session, such as how many threads.
            subfolder (`str`, *optional*): Such as `"int8"`.
            exit_config (*optional*): Used instead of the folder's `exit_config.json`.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for the Hub, and what
                [`~hf_scan.runtime.export_onnx`] takes with `export=True`.

        Raises:
            `OSError`: if there is no export, or a file of it is missing or is not what the manifest describes.
            `ValueError`: if a file names something outside of the folder, or a provider is unknown.
        """
        chosen = _providers(provider, providers, provider_options)
        if export:
            return cls._exported(model_id, chosen, session_options, exit_config, **kwargs)
        folder = Path(model_id, subfolder) if os.path.isdir(model_id) else _downloaded(model_id, subfolder, **kwargs)
        manifest = Manifest.load(folder / ONNX_FOLDER)
        config = _read_config(folder, manifest)
        if exit_config is None:
            exit_config = _read_exit_config(folder)
        if exit_config.thresholds is not None:
            exit_config.resolve(manifest.num_exits)
        return cls(folder, manifest, config, exit_config, chosen, session_options)

    @classmethod
    def _exported(
        cls, model_id: Any, providers: list[Any], session_options: Any, exit_config: Any, **kwargs: Any
    ) -> "ORTScanForImageClassification":
        from ..model.modeling_scan import ScanForImageClassification

        names = ("calibration_dataset", "include_preprocessing", "opset")
        settings = {name: kwargs.pop(name) for name in names if name in kwargs}
        scratch = tempfile.TemporaryDirectory()
        ScanForImageClassification.from_pretrained(model_id, **kwargs).export_onnx(scratch.name, **settings)
        engine = cls.from_pretrained(
            scratch.name, providers=providers, session_options=session_options, exit_config=exit_config
        )
        engine._scratch = scratch
        return engine

    # What a model has besides answers.

    @property
    def exit_config(self) -> Any:
        """How the network answers: an [`~hf_scan.ExitConfig`], or [`ExitSettings`] where PyTorch is missing."""
        return self._exit_config

    @exit_config.setter
    def exit_config(self, exit_config: Any) -> None:
        settings = ExitSettings.of(exit_config)
        if settings.thresholds is not None:
            settings.resolve(self.num_exits)
        self._exit_config = exit_config

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return self.manifest.num_exits

    @property
    def counted(self) -> dict[str, Any]:
        """MACs and parameters of each stage and head, counted when the network was exported."""
        return self.manifest.counted

    @property
    def device(self) -> Any:
        """Where images are wanted: in the memory of the host."""
        return _torch().device("cpu")

    @property
    def dtype(self) -> Any:
        """Numbers of the images."""
        return getattr(_torch(), self.manifest.image["dtype"])

    def to(self, *args: Any, **kwargs: Any) -> "ORTScanForImageClassification":
        """Return the engine as it is: providers are chosen when it is loaded."""
        return self

    def eval(self) -> "ORTScanForImageClassification":
        """Return the engine, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> "ORTScanForImageClassification":
        """Raise a `ValueError`, unless `mode` is `False`."""
        if mode:
            raise ValueError("An exported network is not trained. Train the checkpoint and export it again.")
        return self

    def can_generate(self) -> bool:
        """Return `False`."""
        return False

    def fingerprint(self) -> str:
        """Return SHA-256 of graphs and weights. Thresholds found for one network are not another's."""
        return self.manifest.fingerprint()

    # Running it.

    def forward(self, pixel_values: Any, labels: Any = None) -> EngineOutput:
        """
        Run every stage and every exit.

        Args:
            pixel_values (`np.ndarray` or `torch.Tensor`): The images.
            labels: Not used: there is no loss without PyTorch.
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
        return convert(self._session("plain.onnx").run(None, {"pixel_values": images})[0])

    backbone = plain

    def run(self, index: int, state: Sequence[Any], head: bool) -> tuple[list[Any], Any]:
        """
        Run a stage, and its head with it.

        Args:
            index (`int`): Which stage.
            state (`Sequence[np.ndarray]`): What the stage before returned, or `[pixel_values]`.
            head (`bool`): Whether to run the head. The last stage's always does.

        Returns:
            `tuple[list, np.ndarray]`: what the stage hands on, and the exit's logits, if its head ran.
        """
        names = ["pixel_values"] if index == 0 else [value["name"] for value in self.manifest.states[index - 1]]
        head = head or index == self.num_exits - 1
        session = self._session(f"stage_{index}.onnx" if head else f"stage_{index}_without_head.onnx")
        values = session.run(None, dict(zip(names, state)))
        return (values[1:], values[0]) if head else (values, None)

    def time_parts(self, pixel_values: Any) -> list[float]:
        """
        Return the seconds of each stage and its head, in their order, and of the plain network. A head runs together
        with its stage, so its time is by how much both take longer than the stage alone.
        """
        state: list[Any] = [self._images(pixel_values)[0]]
        images, seconds = state[0], []
        for index in range(self.num_exits):
            start = time.perf_counter()
            after, _ = self.run(index, state, head=False)
            middle = time.perf_counter()
            if index < self.num_exits - 1:
                after, logits = self.run(index, state, head=True)
                (confidence_of(logits) > 0.5).any()  # what it takes to decide who leaves
            both = time.perf_counter() - middle
            alone = middle - start
            # The clock's least where there is nothing to see: a share of nothing is no number.
            seconds += [alone, max(1e-9, both - alone) if index < self.num_exits - 1 else 1e-9]
            state = after
        start = time.perf_counter()
        self._session("plain.onnx").run(None, {"pixel_values": images})
        return [*seconds, time.perf_counter() - start]

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
        if len(images) == 1 and max_time_ms is None and self._is_nested(settings, plan):
            answer = self._run_nested(images, plan)
        else:
            answer = self._run_stages(images, settings, plan, max_time_ms)
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

    def advance(
        self, settings: ExitSettings, plan: list[Step], index: int, group: Group
    ) -> tuple[list[AdaptiveAnswer], Group | None]:
        """Run one stage and its head for a group; return the answers of those that leave, and those that go on."""
        step = plan[index]
        state, logits = self.run(index, group.state, step.runs)
        if not step.runs:
            return [], Group(group.rows, state, group.seen, group.exits)
        earlier = settings.needs_history
        seen, exits = ([*group.seen, logits], [*group.exits, index]) if earlier else ([logits], [index])
        gone = []
        stay = Group(group.rows, state, seen, exits)
        if step.limit is not None:
            score = settings.score(seen, exits)
            leaves = score > step.limit
            if leaves.any():
                out = leaves.nonzero()[0]
                confidence = score[out]
                if settings.criterion != "confidence":
                    confidence = confidence_of(settings.scaled(logits[out], index))
                gone.append(AdaptiveAnswer(logits[out], np.full(len(out), index), confidence, group.rows[out]))
                on = (~leaves).nonzero()[0]
                if len(on) == 0:
                    return gone, None
                stay = self.select(index, stay, on)
        if index < len(plan) - 1:
            return gone, stay
        return [*gone, self.give_up(settings, stay)], None

    def give_up(self, settings: ExitSettings, group: Group) -> AdaptiveAnswer:
        """Answer those that would go on with the fallback."""
        logits, exit_index, confidence = fall_back(settings, group.seen, group.exits, self.num_exits)
        _check_finite(confidence)
        return AdaptiveAnswer(logits, exit_index, confidence, group.rows)

    def select(self, index: int, group: Group, rows: Any) -> Group:
        """Return some samples of a group, by their positions in it; `index` is the stage that they have passed."""
        count = len(group.rows)
        state = [value[rows] if len(value) == count else _windows(value, rows, count) for value in group.state]
        return Group(group.rows[rows], state, [logits[rows] for logits in group.seen], group.exits)

    def check_states_without_heads(self, images: np.ndarray) -> None:
        """Raise a `ValueError` unless each stage hands on the same without its head, to the bit or nearly."""
        state: list[Any] = [images]
        for index in range(self.num_exits - 1):
            alone, _ = self.run(index, state, head=False)
            state, _ = self.run(index, state, head=True)
            for one, other in zip(alone, state):
                if not np.allclose(one, other, rtol=1e-3, atol=1e-4):
                    raise ValueError(f"stage_{index}_without_head.onnx differs from stage_{index}.onnx.")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        Write the engine's folder and its exit configuration elsewhere, or here again. Where the rule is no longer the
        one in `adaptive.onnx` (thresholds may be others; heads that run, criterion, fallback and temperatures may
        not), that file is made anew, which needs the package onnx, or left out.

        Args:
            save_directory (`str` or `Path`): The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push it too.
            kwargs: For [`~ORTScanForImageClassification.push_to_hub`].
        """
        target = Path(save_directory)
        if target.resolve() != self.folder.resolve():
            shutil.copytree(self.folder, target, dirs_exist_ok=True)
        (target / EXIT_CONFIG_NAME).unlink(missing_ok=True)
        if self.exit_config.thresholds is not None or self.exit_config.rule != ExitSettings().rule:
            self.exit_config.save_pretrained(target)
        settings = ExitSettings.of(self.exit_config)
        if settings.thresholds is not None and not self._is_nested(settings, plan_steps(settings, self.num_exits)):
            self._renest(settings, target / ONNX_FOLDER)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """
        Upload the folder in one commit.

        Args:
            repo_id (`str`): The repository. It is created when there is none.
            kwargs: `private`, `token`, `revision`, `subfolder`, `commit_message` and so on.
        """
        from huggingface_hub import HfApi

        api, token = HfApi(token=kwargs.pop("token", None)), kwargs.pop("private", None)
        path = kwargs.pop("subfolder", None)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=token, exist_ok=True).repo_id
            kwargs.setdefault("commit_message", "Upload ONNX model")
            return api.upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo=path, **kwargs)

    # Inside.

    def _settings(self, exit_config: Any, changes: dict[str, Any]) -> ExitSettings:
        settings = ExitSettings.of(self._exit_config if exit_config is None else exit_config)
        return settings.replace(**changes) if changes else settings

    def _is_nested(self, settings: ExitSettings, plan: list[Step]) -> bool:
        """Whether `adaptive.onnx` holds this rule, but for the thresholds."""
        rule = self.manifest.adaptive
        return (
            rule is not None
            and "adaptive.onnx" in self.manifest.files
            and len(plan) == self.num_exits
            and rule["heads"] == [step.runs for step in plan]
            and all(rule[name] == getattr(settings, name) for name in RULE if name != "thresholds")
        )

    def _run_nested(self, images: np.ndarray, plan: list[Step]) -> AdaptiveAnswer:
        limits = np.array([NEVER if step.limit is None else step.limit for step in plan], dtype=np.float32)
        session = self._session("adaptive.onnx")
        logits, exit_index, confidence = session.run(None, {"pixel_values": images, "thresholds": limits})
        _check_finite(confidence)
        return AdaptiveAnswer(logits, exit_index, confidence)

    def _run_stages(
        self, images: np.ndarray, settings: ExitSettings, plan: list[Step], max_time_ms: float | None
    ) -> AdaptiveAnswer:
        started = now = time.perf_counter()
        count = len(images)
        parts: list[AdaptiveAnswer] = []
        group: Group | None = Group(np.arange(count), [images])
        for index in range(len(plan)):
            assert group is not None
            gone, group = self.advance(settings, plan, index, group)
            parts += gone
            if group is None:
                break
            before, now = now, time.perf_counter()
            # The next stage is taken to need as long as this one did.
            if max_time_ms is not None and group.seen and 1000 * (2 * now - before - started) > max_time_ms:
                parts.append(self.give_up(settings, group))
                break
        if len(parts) == 1:
            return AdaptiveAnswer(parts[0].logits, parts[0].exit_index, parts[0].confidence)
        order = np.concatenate([part.ids for part in parts]).argsort()
        names = ("logits", "exit_index", "confidence")
        return AdaptiveAnswer(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))

    def _images(self, pixel_values: Any, values: bool = False) -> tuple[np.ndarray, Any]:
        """The images as an array, and what turns answers into what was given."""
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

    def _session(self, name: str) -> Any:
        session = self._sessions.get(name)
        if session is None:
            with self._lock:
                if name not in self._sessions:
                    self._sessions[name] = self._created(name)
                session = self._sessions[name]
        return session

    def _created(self, name: str) -> Any:
        folder = self.folder / ONNX_FOLDER
        if name not in self.manifest.files:
            raise OSError(f"{folder} holds no {name!r}. Export the network again.")
        options = self.session_options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.use_per_session_threads = not _SHARED_POOL
            options.log_severity_level = 3
        check_weights_beside(folder / name)
        try:
            return onnxruntime.InferenceSession(
                folder / name,
                options,
                providers=[one for one, _ in self.providers],
                provider_options=[settings for _, settings in self.providers],
            )
        except Exception as error:  # of ONNX Runtime, which has many kinds
            reason = str(error).strip().splitlines()[0][:300]
            raise OSError(
                f"ONNX Runtime does not load {folder / name} ({reason}). Weights must lie in {WEIGHTS_NAME!r} beside "
                "it. Export the network again."
            ) from error

    def _renest(self, settings: ExitSettings, folder: Path) -> None:
        """Makes `adaptive.onnx` for another rule, or takes it away."""
        manifest = replace(self.manifest)
        path = folder / "adaptive.onnx"
        path.unlink(missing_ok=True)
        manifest.adaptive = None
        if find_spec("onnx") is not None:
            import onnx

            from .graphs import nest

            plan = plan_steps(settings, self.num_exits)
            rule = {name: getattr(settings, name) for name in RULE if name != "thresholds"}
            manifest.adaptive = {**rule, "heads": [step.runs for step in plan]}
            names = [f"stage_{i}.onnx" if step.runs else f"stage_{i}_without_head.onnx" for i, step in enumerate(plan)]
            stages = [onnx.load(folder / name, load_external_data=False) for name in names]
            states = [[value["name"] for value in values] for values in manifest.states]
            onnx.save(nest(stages, states, manifest.adaptive), path)
        manifest.save(folder)
        if folder.resolve() == (self.folder / ONNX_FOLDER).resolve():
            self.manifest = manifest
            self._sessions.pop("adaptive.onnx", None)


_SHARED_POOL = False


def share_thread_pool(threads: int) -> None:
    """
    Have all engines that are loaded from now on share one pool of threads, rather than each session of theirs keep its
    own. ONNX Runtime has one such pool for a process, and once there is one, *every* session of the process must set
    `SessionOptions.use_per_session_threads = False`; so this is for programs that know all of theirs, and comes before
    the first session.

    Args:
        threads (`int`): How many.
    """
    global _SHARED_POOL
    if not hasattr(onnxruntime, "set_global_thread_pool_sizes"):
        raise RuntimeError("This version of ONNX Runtime has no common thread pool; update it.")
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    _SHARED_POOL = True


def _windows(value: np.ndarray, rows: Any, count: int) -> np.ndarray:
    """Several rows for each image, one image after the other."""
    per_image = value.reshape(count, -1, *value.shape[1:])[rows]
    return per_image.reshape(-1, *value.shape[1:])


def _providers(
    provider: str, providers: Sequence[Any] | None, provider_options: dict[str, Any] | None
) -> list[tuple[str, dict[str, Any]]]:
    given = [(provider, provider_options or {})] if providers is None else list(providers)
    chosen = [(one, {}) if isinstance(one, str) else tuple(one) for one in given]
    available = onnxruntime.get_available_providers()
    for name, _ in chosen:
        if name not in available:
            raise ValueError(f"`provider` is {name!r}, which is not installed; expected one of {available}.")
    return chosen


def _read_config(folder: Path, manifest: Manifest) -> Any:
    """The configuration: Transformers' own object where there is Transformers, else its values."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise OSError(f"{folder} holds no {CONFIG_NAME!r}. Name a folder that `model.export_onnx(folder)` made.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        names = values.get("id2label") or {str(index): f"LABEL_{index}" for index in range(manifest.num_labels)}
        id2label = {int(index): name for index, name in names.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a configuration ({error}). Export the network anew.") from error
    if len(id2label) != manifest.num_labels:
        raise ValueError(
            f"{path} names {len(id2label)} labels, and the exported network has {manifest.num_labels}: the "
            "configuration is of another network. Export it anew."
        )
    if _has_torch():
        from ..model.configuration_scan import ScanConfig

        return ScanConfig.from_pretrained(folder)
    label2id = {name: index for index, name in id2label.items()}
    rest = {"problem_type": None, **values, "id2label": id2label, "label2id": label2id}
    return SimpleNamespace(**{**rest, "num_labels": manifest.num_labels})


def _read_exit_config(folder: Path) -> Any:
    if _has_torch():
        from ..model.exit_config import ExitConfig

        return ExitConfig.from_pretrained(folder)
    path = folder / EXIT_CONFIG_NAME
    if not path.is_file():
        return ExitSettings()
    try:
        return ExitSettings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a valid exit configuration: {error} Find thresholds anew with `hf_scan.calibrate`, or "
            "remove the file."
        ) from error


def _downloaded(model_id: Any, subfolder: str, **kwargs: Any) -> Path:
    if find_spec("huggingface_hub") is None:
        raise OSError(
            f"{model_id} is not a folder, and huggingface_hub, which would load it from the Hub, is not installed."
        )
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    names = [CONFIG_NAME, EXIT_CONFIG_NAME, "preprocessor_config.json", f"{ONNX_FOLDER}/*"]
    folder = snapshot_download(str(model_id), allow_patterns=[prefix + name for name in names], **kwargs)
    return Path(folder, subfolder)


def _has_torch() -> bool:
    return find_spec("torch") is not None and find_spec("transformers") is not None


def _torch() -> Any:
    import torch

    return torch


def _converted(answer: AdaptiveAnswer, convert: Any) -> Any:
    if convert is np.asarray:
        return answer
    from ..model.exit_rule import AdaptiveOutput

    return AdaptiveOutput(**{name: convert(np.ascontiguousarray(value)) for name, value in answer.items()})


def _check_finite(confidence: np.ndarray) -> None:
    if not np.isfinite(confidence.sum()):
        raise ValueError("The network gives logits that are not finite, though the images are. Check its weights.")


__all__ = ["MANIFEST_NAME", "EngineOutput", "ORTScanForImageClassification", "share_thread_pool"]
