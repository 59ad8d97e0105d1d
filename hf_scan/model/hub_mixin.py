# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Load, save and push a network with its exit configuration: [`HubMixin`]."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from .exit_config import EXIT_CONFIG_NAME, ExitConfig, as_exit_config
from .hub_files import check_regular_files, checked_downloads, resolve_revision
from .image_processing_scan import create_image_processor
from .loading_checks import (
    check_backbone_is_whole,
    check_no_adapter,
    initialise_as_timm,
    of_these_weights,
    weights_to_load,
)
from .minimal_card import minimal_card
from .named_errors import named_push_errors
from .problem_type import for_problem
from .provenance import join_trained_on, unknown_images
from .staged_folder import settled_state, staged
from .weight_files import (
    CheckpointWeights,
    DamagedWeightsError,
    being_loaded,
    check_fits,
    check_shards,
    find_weight_files,
    folder_state,
)


logger = logging.get_logger(__name__)


LOAD_ATTEMPTS = 5
LONGEST_REASON = 1000  # characters; a message may repeat a value of any length
# What invalid values in a configuration raise in Transformers, timm and PyTorch.
INVALID = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, StrictDataclassError)
# What a checkpoint consists of in one form or another, and a push replaces. (In folders of the repository, too, may be
# files of these names: they are not meant.)
OBSOLETE = [
    EXIT_CONFIG_NAME,
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
]


class HubMixin(PreTrainedModel):
    """A mixin that loads, saves and pushes a [`ScanForImageClassification`]."""

    @property
    def exit_config(self) -> ExitConfig:
        """
        The rule by which the network exits, saved beside the weights. Whatever is assigned, its `trained_on` keeps the
        images that these weights are known to have been trained on: they belong to the weights, not to the rule.
        """
        return self._exit_config

    @exit_config.setter
    def exit_config(self, value: ExitConfig | dict[str, Any]) -> None:
        exit_config: ExitConfig = for_problem(as_exit_config(value), self.config.problem_type)
        before = vars(self).get("_exit_config")
        if before is not None:
            trained_on = join_trained_on(before.trained_on, exit_config.trained_on)
            if trained_on != exit_config.trained_on:
                exit_config = exit_config.replace(trained_on=trained_on)
        self._exit_config = exit_config

    def get_input_embeddings(self) -> None:
        """Return `None`, as there are no token embeddings. Quantisation by torchao asks for them."""

    def post_init(self) -> None:
        weights = being_loaded.get()
        if weights is not None and weights.shapes:
            tensors = {**dict(self.named_parameters()), **_persistent_buffers(self)}
            quantized = getattr(self.config, "quantization_config", None) is not None
            check_fits(weights, tensors, f"{self.base_model_prefix}.", quantized)
        super().post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        exit_config: ExitConfig | dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load a network as [`~transformers.PreTrainedModel.from_pretrained`] does, with the exit configuration beside
        the weights, of the same commit. Thresholds that were found for other weights are left out with a warning.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a repository on the Hub; `None` with `config`
                and `state_dict`.
            exit_config ([`ExitConfig`], `dict` or `str`, *optional*): Used instead of the checkpoint's
                `exit_config.json`; a name is that of another file there. Its `trained_on` keeps what the checkpoint's
                says, which belongs to the weights.

        Raises:
            `OSError`: if there are no weights, or they are damaged; if a file came from the Hub with another checksum
                than it has there. It is taken out of the cache again.
            `ValueError`: if the configuration is invalid, another model's or of a much larger network, the weights
                lack some of the backbone's, or the exit configuration is invalid.
            `RuntimeError`: if weights have another shape, and `ignore_mismatched_sizes` is not given.
        """
        loading_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True  # Transformers would fall back to a pickle
        name = pretrained_model_name_or_path
        if name is not None and os.path.isdir(name):
            model, info = cls._load_unchanged(
                Path(name, kwargs.get("subfolder") or ""), name, model_args, kwargs, exit_config
            )
        else:
            model, info = cls._load(name, model_args, kwargs, exit_config)
        return (model, info) if loading_info else model

    @classmethod
    def _load_unchanged(
        cls,
        folder: Path,
        name: str | os.PathLike[str],
        model_args: tuple[Any, ...],
        kwargs: dict[str, Any],
        exit_config: ExitConfig | dict[str, Any] | str | None,
    ) -> tuple[Any, dict[str, Any]]:
        """Load a folder as it is at one moment: anew where it is saved to meanwhile."""
        for attempt in range(LOAD_ATTEMPTS):
            before = settled_state(folder)
            check_regular_files(folder)
            try:
                return_value = cls._load(name, model_args, dict(kwargs), exit_config)
            except Exception:
                if attempt == LOAD_ATTEMPTS - 1 or folder_state(folder) == before:
                    raise
                continue
            if folder_state(folder) == before:
                return return_value
        raise OSError(
            f"{name} changed each of the {LOAD_ATTEMPTS} times that it was loaded. Load it when it is saved."
        )

    @classmethod
    def _load(
        cls,
        name: str | os.PathLike[str] | None,
        model_args: tuple[Any, ...],
        kwargs: dict[str, Any],
        exit_config: ExitConfig | dict[str, Any] | str | None,
    ) -> tuple[Any, dict[str, Any]]:
        access: dict[str, Any] = {
            key: kwargs[key] for key in ("token", "local_files_only", "cache_dir") if key in kwargs
        }
        if name is not None:
            check_shards(name, kwargs.get("subfolder") or "")
            kwargs["revision"] = resolve_revision(name, kwargs.get("revision"), **access)
            check_no_adapter(name, kwargs, access)
        weights = weights_to_load(name, kwargs, access)
        token = being_loaded.set(weights)
        try:
            model, info = cls._load_weights(name, model_args, kwargs)
        finally:
            being_loaded.reset(token)
        check_backbone_is_whole(name, info)
        initialise_as_timm(model, [key for key, *_ in info["mismatched_keys"]])
        if name is None:
            found = ExitConfig() if exit_config is None else exit_config
        else:
            found = cls._find_exit_config(name, exit_config, model, kwargs, access)
        changed = any(info[kind] for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"))
        given = isinstance(exit_config, (ExitConfig, dict))
        model.exit_config = of_these_weights(as_exit_config(found), model, weights, changed and not given)
        if model.exit_config.thresholds is not None:
            try:
                model.exit_config.resolve(model.num_exits)
            except ValueError as error:
                if given or name is None:
                    raise
                file = exit_config if isinstance(exit_config, str) else EXIT_CONFIG_NAME
                raise ValueError(f"{file} of {name} is of another network: {error}") from error
        return model, info

    @classmethod
    def _load_weights(
        cls, name: str | os.PathLike[str] | None, model_args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Call Transformers, and say what its errors are about."""
        try:
            with checked_downloads(name, kwargs.get("cache_dir")):
                model, info = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
                return model, info
        except SafetensorError as error:
            weights = being_loaded.get()
            if weights is not None:
                _ = weights.headers  # names the file, if its header shows the damage
            raise DamagedWeightsError(name, error) from error
        except DamagedWeightsError:
            raise
        except OSError as error:
            if name is None or not os.path.isdir(name):
                raise
            raise OSError(
                f"{name} holds no model that can be loaded ({error}). Write one there with `save_pretrained`, or name "
                "the folder that holds it."
            ) from error
        except INVALID as error:
            if name is None or (isinstance(error, TypeError) and "unexpected keyword argument" in str(error)):
                raise
            said = " ".join(str(error).split())[:LONGEST_REASON] or "no reason is given"
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"config.json of {name}, or an argument that overrides it, describes no network that can be made: "
                f"{kind}{said}"
            ) from error

    @classmethod
    def _find_exit_config(
        cls,
        name: str | os.PathLike[str],
        exit_config: ExitConfig | dict[str, Any] | str | None,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        access: dict[str, Any],
    ) -> ExitConfig:
        given = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")
        settings = {key: kwargs[key] for key in given if key in kwargs}
        # The commit of the weights, though there may be a newer one by now. What could not be resolved before the load
        # has been written down by it; older versions of Transformers note it in the configuration.
        revision = getattr(model.config, "_commit_hash", None) or resolve_revision(
            name, kwargs["revision"], **{**access, "local_files_only": True}
        )
        if exit_config is None:
            return ExitConfig.from_pretrained(name, revision=revision, **settings)
        try:
            trained_on = ExitConfig.from_pretrained(name, revision=revision, **settings).trained_on
        except (OSError, ValueError):
            trained_on = unknown_images(f"weights whose {EXIT_CONFIG_NAME} cannot be read")
        if isinstance(exit_config, str):
            found = ExitConfig.from_pretrained(name, exit_config, revision=revision, **settings)
        else:
            found = as_exit_config(exit_config)
        joined = join_trained_on(trained_on, found.trained_on)
        return found if joined == found.trained_on else found.replace(trained_on=joined)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Save the network as [`~transformers.PreTrainedModel.save_pretrained`] does, with `exit_config.json` beside the
        weights, and the backbone's preprocessing where the folder has none yet. Files are written beside those that
        are there and renamed at the end: a save that fails or is killed leaves the old checkpoint. Thresholds that
        were found for other weights are left out with a warning.

        Args:
            include_code (`bool`, *optional*, defaults to `False`): Whether to save the network's own code with it, so
                that `AutoModelForImageClassification.from_pretrained(..., trust_remote_code=True)` needs no `hf_scan`.

        Raises:
            `ValueError`: if the backbone is a module of the user's own, which no configuration can make again.
            `OSError`: if the files cannot be written. Nothing in the folder has changed then.
        """
        check_savable(self.config)
        if self.exit_config.thresholds is not None:
            self.exit_config.resolve(self.num_exits)  # before anything is written
        self.exit_config.check_savable()
        places = ("repo_id", "private", "create_pr", "revision", "subfolder")
        words = ("commit_message", "commit_description", "tags")
        hub_kwargs = {name: kwargs.pop(name) for name in (*places, *words) if name in kwargs}
        with self._with_code(include_code or self._auto_class is not None):
            if not is_main_process or kwargs.get("distributed_checkpoint") or os.path.isfile(save_directory):
                super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            else:
                removed: list[str] = []
                with staged(save_directory, removed) as folder:
                    super().save_pretrained(folder, is_main_process=True, **kwargs)
                    self._save_beside_weights(folder, Path(save_directory), kwargs.get("variant"), removed)
        if push_to_hub and is_main_process:
            # Not left to `super()`, which would upload before the exit configuration is written.
            hub_kwargs.setdefault("repo_id", Path(save_directory).name)
            hub_kwargs |= {name: kwargs[name] for name in ("max_shard_size", "token") if name in kwargs}
            self.push_to_hub(include_code=include_code, **hub_kwargs)

    def _save_beside_weights(self, folder: Path, target: Path, variant: str | None, removed: list[str]) -> None:
        if self.config.num_channels == 3 and not (target / IMAGE_PROCESSOR_NAME).exists():
            create_image_processor(self).save_pretrained(folder)
        config = self.exit_config
        if config.thresholds:
            config = self._for_saved_weights(find_weight_files(lambda name: _if_file(folder / name), variant))
        if config != ExitConfig():
            config.save_pretrained(folder)
        else:
            removed.append(EXIT_CONFIG_NAME)

    def _for_saved_weights(self, files: list[Path]) -> ExitConfig:
        """Return the exit configuration with the fingerprint of weights, or without thresholds if it has another."""
        if not files:  # of a format of Transformers' own
            return self.exit_config
        names = [*dict(self.named_parameters()), *_persistent_buffers(self)]
        found = CheckpointWeights("", lambda: files).fingerprint(names, f"{self.base_model_prefix}.")
        if self.exit_config.weights in (None, found):
            return self.exit_config.replace(weights=found)
        logger.warning(
            "The weights have changed since the thresholds of `exit_config` were found, which are left out of what is "
            "saved. Find others with `hf_scan.calibrate`; to save them nevertheless, set "
            "`model.exit_config.weights = None`."
        )
        return self.exit_config.replace(thresholds=None, temperatures=None)

    def push_to_hub(self, repo_id: str, *, include_code: bool = False, **kwargs: Any) -> Any:
        """
        Push the network as [`~transformers.PreTrainedModel.push_to_hub`] does: weights, configuration,
        `exit_config.json` and image processor in one commit, which also removes weights and thresholds that are no
        longer the model's. A repository without a card gets one.

        Args:
            repo_id (`str`): The repository, such as `"org/scan-resnet50"`. It is created when there is none.
            include_code (`bool`, *optional*, defaults to `False`): As in `save_pretrained`.
            kwargs: `private`, `token`, `revision`, `subfolder`, `create_pr`, `commit_message` and so on.

        Raises:
            `ValueError`: if the network cannot be saved, or the Hub's client refuses an argument.
            `OSError`: if the Hub cannot be reached, or refuses. Nothing of the repository's files has changed then,
                unless the connection ended after the commit.
        """
        subfolder = kwargs.pop("subfolder", None)
        names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        tags = [*self.model_tags, *(kwargs.pop("tags", None) or [])]
        token = {"token": given.get("token")}
        api = HfApi()
        with self._with_code(include_code), tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)  # first: what cannot be saved leaves no empty repository
            with named_push_errors(repo_id):
                repo_id = api.create_repo(repo_id, private=given.pop("private", None), exist_ok=True, **token).repo_id
                revision = given.get("revision")
                if revision is not None and not given.get("create_pr") and not revision.startswith("refs/"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True, **token)
                adaptive = self.exit_config.thresholds is not None
                named: dict[str, Any] = {
                    "backbone": self.config.backbone,
                    "source": self.config.backbone_source,
                    **token,
                }
                card = None if subfolder else minimal_card(repo_id, adaptive=adaptive, tags=tags, **named)
                if card is not None:
                    card.save(Path(folder, "README.md"))
                given.setdefault("commit_message", "Upload model")
                # In the same commit, what an earlier push left: weights in another number of files, thresholds of
                # theirs.
                given |= {"folder_path": folder, "path_in_repo": subfolder or None, "delete_patterns": OBSOLETE}
                return api.upload_folder(repo_id=repo_id, **given)

    @contextmanager
    def _with_code(self, included: bool) -> Iterator[None]:
        """Save the code that the network runs with what is saved meanwhile, or name none there."""
        named = self.config.__dict__.pop("auto_map", None)
        classes: tuple[Any, ...] = (type(self), type(self.config))
        before = [owner._auto_class for owner in classes]
        if included:
            # For good, it would have every later checkpoint carry code.
            for owner, auto_class in zip(classes, ("AutoModelForImageClassification", "AutoConfig")):
                owner.register_for_auto_class(auto_class)
        try:
            yield
        finally:
            for owner, auto_class in zip(classes, before):
                owner._auto_class = auto_class
            self.config.__dict__.pop("auto_map", None)
            if named is not None:
                self.config.auto_map = named


def check_savable(config: Any) -> None:
    """Raise a `ValueError` if no configuration can make the backbone again."""
    if config.backbone_source == "custom":
        raise ValueError(
            f"The backbone is a {config.backbone}, a module of its own that no configuration can make again, and a "
            "checkpoint holds no code. Register the network with timm (see 'A backbone' in CONTRIBUTING.md), or keep "
            "`model.state_dict()` and convert the module anew; `export_onnx` needs no code."
        )


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the buffers that a checkpoint holds."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


__all__ = ["HubMixin"]
