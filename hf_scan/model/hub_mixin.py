# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Load, save and push a network with its exit configuration: [`HubMixin`]."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, is_peft_available, logging

from .exit_config import EXIT_CONFIG_NAME, ExitConfig
from .hub_files import checked_downloads, find_file, pinned
from .image_processing_scan import create_image_processor


logger = logging.get_logger(__name__)


ADAPTER = "adapter_config.json"
# What a checkpoint consists of in one form or another, and a push replaces. (In folders of the repository, too, may be
# files of these names: they are not meant.)
OBSOLETE = [
    EXIT_CONFIG_NAME,
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
]


MINIMAL_CARD = """---
{metadata}
---

# {name}

An image classifier with early exits: a `{backbone}` of timm that answers easy images before its last layer.
{thresholds}

```python
import hf_scan  # registers the model with Transformers
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{name}")
answer = {call}  # `image` as the model's image processor prepares it
```
"""


class HubMixin(PreTrainedModel):
    """Loading, saving and pushing for [`ScanForImageClassification`]."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        exit_config: ExitConfig | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], and loads the exit configuration beside the weights, of
        the same commit.

        Args:
            exit_config ([`ExitConfig`] or `str`, *optional*): Used instead of the checkpoint's `exit_config.json`; or
                the name of another file there.

        Raises:
            `OSError`: if there are no weights, or they are damaged; if a file came from the Hub with another checksum
                than it has there. It is taken out of the cache again.
            `ValueError`: if the configuration is another model's, the weights lack some of the backbone's, or the
                exit configuration is not valid.
        """
        loading_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True  # Transformers would fall back to a pickle
        _check_shards(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        names = ("token", "local_files_only", "cache_dir")
        access = {name: kwargs[name] for name in names if name in kwargs}
        kwargs["revision"] = pinned(pretrained_model_name_or_path, kwargs.get("revision"), **access)
        where = {name: kwargs[name] for name in ("revision", "subfolder") if kwargs.get(name)}
        if is_peft_available() and find_file(pretrained_model_name_or_path, ADAPTER, **access, **where) is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {ADAPTER!r}, by which Transformers would load what that names "
                "instead. Adapters are not supported; remove the file."
            )
        try:
            with checked_downloads(pretrained_model_name_or_path, kwargs.get("cache_dir")):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} cannot be read ({error}): the file is truncated or "
                "is not a safetensors file. Save or download it again."
            ) from error
        except OSError as error:
            if not os.path.isdir(pretrained_model_name_or_path):
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} holds no model that can be loaded ({error}). Write one there with "
                "`save_pretrained`, or name the folder that holds it."
            ) from error
        missing = sorted(key for key in info["missing_keys"] if key.startswith("backbone."))
        if missing:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} lack {len(missing)} of the backbone's, the first "
                f"being {missing[0]!r}. Load a whole checkpoint, or correct `config.backbone`."
            )
        if not isinstance(exit_config, ExitConfig):
            given = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")
            settings = {name: kwargs[name] for name in given if name in kwargs}
            # The commit of the weights, though there may be a newer one by now. What could not be resolved before the
            # load has been written down by it; older versions of Transformers note it in the configuration.
            revision = getattr(model.config, "_commit_hash", None) or pinned(
                pretrained_model_name_or_path, kwargs["revision"], **{**access, "local_files_only": True}
            )
            exit_config = ExitConfig.from_pretrained(
                pretrained_model_name_or_path, exit_config or EXIT_CONFIG_NAME, revision=revision, **settings
            )
            other = any(info[kind] for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"))
            if other and exit_config.costs is not None:
                exit_config = exit_config.replace(costs=None)
            if other and exit_config.thresholds is not None:
                logger.warning(
                    "The network is not the one that was saved, so the checkpoint's thresholds do not belong to it "
                    "and are left out. Find others with `hf_scan.calibrate` once the model is trained."
                )
                exit_config = exit_config.replace(thresholds=None, temperatures=None)
        if exit_config.thresholds is not None:
            exit_config.resolve(model.num_exits)
        model.exit_config = exit_config
        return (model, info) if loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], with `exit_config.json` beside the weights, and the
        backbone's preprocessing where the folder has none yet.

        Args:
            include_code (`bool`, *optional*, defaults to `False`): Whether to save the network's own code with it, so
                that `AutoModelForImageClassification.from_pretrained(..., trust_remote_code=True)` needs no `hf_scan`.
        """
        if self.exit_config.thresholds is not None:
            self.exit_config.resolve(self.num_exits)  # before anything is written
        places = ("repo_id", "private", "create_pr", "revision", "subfolder")
        words = ("commit_message", "commit_description", "tags")
        hub_kwargs = {name: kwargs.pop(name) for name in (*places, *words) if name in kwargs}
        with self._with_code(include_code or self._auto_class is not None):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            if self.config.num_channels == 3 and not Path(save_directory, IMAGE_PROCESSOR_NAME).exists():
                create_image_processor(self).save_pretrained(save_directory)
            if self.exit_config != ExitConfig():
                self.exit_config.save_pretrained(save_directory)
            else:
                # Thresholds that were found for other weights must not be loaded with these.
                Path(save_directory, EXIT_CONFIG_NAME).unlink(missing_ok=True)
        if push_to_hub and is_main_process:
            # Not left to `super()`, which would upload before the exit configuration is written.
            hub_kwargs.setdefault("repo_id", Path(save_directory).name)
            hub_kwargs |= {name: kwargs[name] for name in ("max_shard_size", "token") if name in kwargs}
            self.push_to_hub(include_code=include_code, **hub_kwargs)

    def push_to_hub(self, repo_id: str, *, include_code: bool = False, **kwargs: Any) -> Any:
        """
        As [`~transformers.PreTrainedModel.push_to_hub`]: weights, configuration, `exit_config.json` and image
        processor in one commit, which takes weights and thresholds away that are no longer the model's. A repository
        without a card gets one.

        Args:
            repo_id (`str`): The repository, such as `"org/scan-resnet50"`. It is created when there is none.
            include_code (`bool`, *optional*, defaults to `False`): As in `save_pretrained`.
            kwargs: `private`, `token`, `revision`, `subfolder`, `create_pr`, `commit_message` and so on.
        """
        subfolder = kwargs.pop("subfolder", None)
        names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        tags = [*self.model_tags, *(kwargs.pop("tags", None) or [])]
        token = {"token": given.get("token")}
        api = HfApi()
        with self._with_code(include_code), tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)  # first: what cannot be saved leaves no empty repository
            repo_id = api.create_repo(repo_id, private=given.pop("private", None), exist_ok=True, **token).repo_id
            revision = given.get("revision")
            if revision is not None and not given.get("create_pr") and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True, **token)
            card = self._card_of(repo_id, tags, token["token"]) if not subfolder else None
            if card is not None:
                card.save(Path(folder, "README.md"))
            given.setdefault("commit_message", "Upload model")
            # In the same commit, what an earlier push left: weights in another number of files, thresholds of theirs.
            given |= {"folder_path": folder, "path_in_repo": subfolder or None, "delete_patterns": OBSOLETE}
            return api.upload_folder(repo_id=repo_id, **given)

    def _card_of(self, repo_id: str, tags: list[str], token: Any) -> Any:
        """A card for a repository that has none; its own, where tags are to be added; None to leave it as it is."""
        try:
            card = ModelCard.load(repo_id, token=token)
        except LocalEntryNotFoundError:
            return None
        except EntryNotFoundError:
            data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=tags)
            return ModelCard(MINIMAL_CARD.format(metadata=data.to_yaml(), name=repo_id, **self._card_facts()))
        except Exception as error:  # of the client, whose kinds differ between its versions
            logger.warning(f"The card of {repo_id} cannot be read ({error}), and is left as it is.")
            return None
        known = card.data.tags or []
        card.data.tags = list(dict.fromkeys([*known, *tags]))
        return card if card.data.tags != known else None

    def _card_facts(self) -> dict[str, str]:
        """Return what the minimal card says of the network."""
        if self.exit_config.thresholds is None:
            text, call = "It has no thresholds yet: all images run to the end.", "model(image[None]).logits"
        else:
            text, call = "Its thresholds are in `exit_config.json`.", "model.predict_adaptive(image[None]).logits"
        return {"backbone": self.config.backbone, "thresholds": text, "call": call}

    @contextmanager
    def _with_code(self, included: bool) -> Iterator[None]:
        """Has what is saved meanwhile hold the code that it runs, or name none."""
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


def _check_shards(path: str | os.PathLike[str], subfolder: str) -> None:
    """Refuses an index of weights that names files elsewhere. On the Hub there is no elsewhere."""
    for index in Path(path, subfolder).glob("*.index*.json"):  # of any variant
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of weights ({error}). Save or download it again.") from error
        elsewhere = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
        if elsewhere:
            raise ValueError(
                f"{index} names {elsewhere[0]!r}, which is not a file beside it; a checkpoint has no business there."
            )


__all__ = ["HubMixin"]
