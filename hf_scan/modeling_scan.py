# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The network: a timm backbone with early exits, as a model of Transformers."""

import copy
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import is_model_pretrained, load_model_config_from_hf
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import IMAGE_PROCESSOR_NAME, ModelOutput, is_peft_available, logging

from .adaptive import EXIT_CONFIG_NAME, ExitConfig
from .adaptive_stream import AdaptiveStreamMixin
from .configuration_scan import PREPROCESSING_KEYS, ScanConfig
from .exit_heads import ExitHead, FoldedHead
from .hub_files import checked_downloads, find_file, pinned
from .image_processing_scan import create_image_processor
from .stages import Stage, cut_into_stages, keep_parts


logger = logging.get_logger(__name__)

ADAPTER = "adapter_config.json"
# What a checkpoint consists of in one form or another, and a push replaces. (In folders of the repository, too, may be
# files of these names: they are not meant.)
OBSOLETE = [
    EXIT_CONFIG_NAME,
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
]


@dataclass
class ScanImageClassifierOutput(ModelOutput):
    """
    What a [`ScanForImageClassification`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Sum over the exits of the cross-entropy.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): The deepest exit's.
        exit_logits (`tuple[torch.FloatTensor]`): One of the same shape per exit, from shallow to deep.
        ensemble_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Mean over the exits.
        exit_features (`tuple[torch.FloatTensor]`, *optional*, returned when `output_exit_features=True`):
            One of shape `(batch_size, feature_size)` per exit: what the backbone's last layer reads, and of each early
            exit the same, brought to that width where it is narrower.
        attentions (`tuple[torch.FloatTensor]`, *optional*, returned when `output_attentions=True`):
            The mask of each early exit, `(batch_size, channels, height, width)` between 0 and 1: what its attention
            lets through of the feature it looks at.
    """

    loss: torch.Tensor | None = None
    # Never None; a ModelOutput wants defaults.
    logits: torch.Tensor = None  # type: ignore[assignment]
    exit_logits: tuple[torch.Tensor, ...] = None  # type: ignore[assignment]
    ensemble_logits: torch.Tensor = None  # type: ignore[assignment]
    exit_features: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ScanForImageClassification(AdaptiveStreamMixin, PreTrainedModel):
    """
    A timm image classifier with early exits: Zhang et al., "SCAN: A Scalable Neural Networks Framework Towards
    Compact and Efficient Models", NeurIPS 2019.

    `model.backbone` is the timm model itself, with its own modules and parameter names, and answers as the deepest
    exit does. `model.exit_heads` holds the early exits.

    Args:
        config ([`ScanConfig`]): What the network is. Fields that are left to defaults are filled in, so that a saved
            configuration says them.

    Raises:
        `ValueError`: if the backbone cannot be cut at the exit points, or has fewer than two labels.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> out = model(torch.rand(2, 3, 32, 32))
    >>> len(out.exit_logits), out.logits.shape
    (3, torch.Size([2, 10]))
    ```
    """

    config: ScanConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ExitHead"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: ScanConfig) -> None:
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(f"`num_labels` is {config.num_labels}; a classifier needs at least 2.")
        self.num_labels = config.num_labels
        self.gradient_checkpointing = False  # of whole stages; set by Transformers
        self.backbone_frozen = False
        self._compiled: dict[str, Any] = {}  # stages and heads, by `compile_stages`
        self.backbone = _create_backbone(config)
        # timm has just initialised its model in its own way, and Transformers must not do it again in another. On
        # the meta device nothing has been initialised: there the flag would leave raw memory behind.
        if not any(parameter.is_meta for parameter in self.backbone.parameters()):
            for module in self.backbone.modules():
                module._is_hf_initialized = True

        config.image_size = config.image_size or self.backbone.pretrained_cfg["input_size"][-1]
        config.preprocessing = _preprocessing(self.backbone.pretrained_cfg) | (config.preprocessing or {})
        stages = cut_into_stages(self.backbone, config.exit_points)
        deepest = stages[-1]
        with init.no_init_weights():  # `post_init` does it
            self.exit_heads = nn.ModuleList(
                ExitHead(
                    channels=stage.channels,
                    stride=max(1, deepest.reduction // stage.reduction),
                    feature_size=getattr(self.backbone, "head_hidden_size", self.backbone.num_features),
                    num_labels=config.num_labels,
                    attention_type=config.attention_type,
                    classifier_type=config.classifier_type,
                    head_width=config.head_width,
                )
                for stage in stages[:-1]
            )
        config.exit_points = [stage.name for stage in stages[:-1]]
        self.stages = self._truncated(stages) if config.truncated else stages
        self.exit_config = ExitConfig()
        self.model_tags = ["early-exit", "scan", "timm", "hf_scan"]  # of the card; Transformers adds to the list
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("stages", "_compiled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compiled = {}
        # Functions of the backbone, which no pickle holds.
        if not self.config.truncated:
            self.stages = cut_into_stages(self.backbone, self.config.exit_points)
            return
        with torch.device("meta"):
            whole = _create_backbone(self.config)
        self.stages = self._truncated(cut_into_stages(whole, self.config.exit_points))

    def _truncated(self, stages: list[Stage]) -> list[Stage]:
        """The first stage only, and nothing in the backbone that it does not use."""
        if len(stages) != 2:
            raise ValueError(
                f"A truncated network ends at its one exit point; `exit_points` is {self.config.exit_points}. Give "
                "one of them."
            )
        keep_parts(self.backbone, stages[0].parts)
        return stages[:1]

    def truncate(self, exit: int) -> "ScanForImageClassification":
        """
        The paper's compression: a small static network that answers as one of the early exits does, to the bit. It
        holds the stages up to there and that exit's head, and is saved, pushed and loaded like any other.

        Args:
            exit (`int`): Which early exit, from 0.

        Returns:
            [`ScanForImageClassification`]: a copy, in the same mode, with one exit.

        Raises:
            `ValueError`: if there is no such early exit.

        Example:

        ```python
        >>> import torch
        >>> from hf_scan import ScanConfig, ScanForImageClassification

        >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
        >>> small = model.truncate(exit=0)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> torch.equal(small(images).logits, model(images).exit_logits[0])
        True
        >>> small.num_parameters() < 0.2 * model.num_parameters()
        True
        ```
        """
        if self.config.truncated or not 0 <= exit < len(self.exit_heads):
            raise ValueError(
                f"`exit` is {exit}; this network can be truncated at {list(range(self.num_exits - 1))}. What answers "
                "at the deepest exit is `model.backbone`."
            )
        small = copy.deepcopy(self)
        small.config.exit_points = [self.stages[exit].name]
        small.config.truncated = True
        small.exit_heads = nn.ModuleList([small.exit_heads[exit]])
        small.stages = small._truncated(cut_into_stages(small.backbone, small.config.exit_points))
        small.exit_config = ExitConfig(thresholds=[], fallback="deepest")  # there is nothing to decide
        return small

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return len(self.stages)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # He et al., "Delving Deep into Rectifiers", 2015; Transformers' default of N(0, 0.02) is for transformers.
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # PyTorch's own
        else:
            super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
            init.zeros_(module.bias)
        # Buffers that no checkpoint holds come out of the meta device as raw memory.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    def freeze_backbone(self, frozen: bool = True) -> None:
        """
        From now on, only the early exits are trained: the backbone gets no gradient, and it stays in evaluation mode
        when the model is put into training mode, so that its batch norm statistics and its answers stay as they are.

        Args:
            frozen (`bool`, *optional*, defaults to `True`): `False` lets it be trained again.
        """
        self.backbone.requires_grad_(not frozen)
        self.backbone_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> "ScanForImageClassification":
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        if mode:
            self._compiled = {}
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> "ScanForImageClassification":
        super()._apply(*args, **kwargs)
        for index, head in enumerate(self.exit_heads):
            if isinstance(head, ExitHead) and isinstance(self._compiled.get(f"head {index}"), FoldedHead):
                self._compiled[f"head {index}"] = FoldedHead(head)
        return self

    def run_stage(self, index: int, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """
        Runs a stage of the backbone.

        Args:
            index (`int`): Which one.
            state (`tuple`): What the stage before returned, or `(pixel_values,)` for the first.

        Returns:
            `tuple`: the stage's feature, alone on most networks, and what later stages need besides.
        """
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.stages[index].run, self.backbone, state)
        return self._compiled.get(f"stage {index}", self.stages[index].forward)(self.backbone, *state)

    def _run_stages(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """The feature of each stage as its head wants it, and at last the one that the backbone's own head wants."""
        state: tuple[Any, ...] = (pixel_values,)
        for index, stage in enumerate(self.stages):
            state = self.run_stage(index, state)
            yield stage.feature(state) if index < len(self.exit_heads) else state[0]

    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Runs the backbone only.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.

        Returns:
            `tuple[torch.Tensor]`: what each early exit looks at, `(batch_size, channels, height, width)`, and what the
            backbone's own head does. [`~ScanForImageClassification.forward`] takes it as `stage_features`.
        """
        self.check_pixel_values(pixel_values)
        return tuple(self._run_stages(pixel_values))

    def run_exit(self, index: int, state: tuple[Any, ...]) -> torch.Tensor:
        """An exit's logits `(batch_size, num_labels)` from what its stage returned."""
        if index == len(self.exit_heads):
            return self._compiled.get("deepest head", self.backbone.forward_head)(state[0])
        head = self._compiled.get(f"head {index}", self.exit_heads[index])
        return head(self.stages[index].feature(state))[1]

    def compile_stages(self, **kwargs: Any) -> None:
        """
        Compiles each stage and each head by itself with `torch.compile`, for adaptive inference, whose batches shrink:
        the first batch size is compiled as it is, others for the few ranges of sizes that PyTorch divides them into,
        each when it first occurs. (`torch.compile(model)` compiles the whole network with every exit, for training.)

        On a CPU, heads are not compiled, which makes them slower: they are reduced to their bare calls, with batch
        norms folded into weights. There, `TORCHINDUCTOR_FREEZING=1` in the environment lets PyTorch do the same with
        the stages and lay weights out for the machine, which is worth more than all the rest. Call it when the weights
        are what they will be, and anew when they change; training mode undoes it.

        Args:
            kwargs: For `torch.compile`: `mode`, `backend` and so on.

        Example:

        ```python
        >>> import torch
        >>> from hf_scan import ScanConfig, ScanForImageClassification

        >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
        >>> model.compile_stages(backend="eager")  # leave `backend` out to be faster
        >>> model.predict_adaptive(torch.rand(3, 3, 32, 32), thresholds=[0.9, 0.9]).logits.shape
        torch.Size([3, 10])
        ```
        """
        for index, stage in enumerate(self.stages):
            self._compiled[f"stage {index}"] = torch.compile(stage.forward, **kwargs)
        for index, head in enumerate(self.exit_heads):
            if isinstance(head, ExitHead) and all(weight.device.type == "cpu" for weight in head.parameters()):
                self._compiled[f"head {index}"] = FoldedHead(head)
                continue
            # What is compiled belongs to a function's code, which a few heads would fill: each gets its own.
            forward = FunctionType(ExitHead.forward.__code__.replace(), ExitHead.forward.__globals__)
            self._compiled[f"head {index}"] = torch.compile(MethodType(forward, head), **kwargs)
        if not self.config.truncated:
            self._compiled["deepest head"] = torch.compile(self.backbone.forward_head, **kwargs)

    def join_states(self, index: int, states: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """What a stage returned for several batches, as for one batch of all of them."""
        return self.stages[index].join(states)

    def select_rows(
        self, index: int, state: tuple[Any, ...], rows: torch.Tensor | slice, batch_size: int
    ) -> tuple[Any, ...]:
        """What a stage returned, of the images `rows` of a batch of `batch_size` only."""
        return self.stages[index].select(state, rows, batch_size)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        stage_features: tuple[torch.Tensor, ...] | None = None,
        output_exit_features: bool = False,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ScanImageClassifierOutput | tuple[Any, ...]:
        """
        Runs every stage and every exit.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Class indices, for the loss.
            stage_features (`tuple[torch.Tensor]`, *optional*): In place of images, what
                [`~ScanForImageClassification.extract_features`] returned for them. Then only the heads are run.
            output_exit_features (`bool`, *optional*, defaults to `False`): Whether to return each exit's feature.
            output_attentions (`bool`, *optional*): Whether to return the attention mask of each early exit. Defaults
                to `config.output_attentions`.
            return_dict (`bool`, *optional*): Whether to return an output object rather than a tuple.

        Raises:
            `ValueError`: if the images are not what the network takes. On the CPU, where looking costs no transfer,
                also if pixels are NaN or infinite or labels are out of range.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        look = not torch.compiler.is_compiling()
        if pixel_values is not None:
            self.check_pixel_values(pixel_values, values=look and pixel_values.device.type == "cpu")
            features = self._run_stages(pixel_values)
        elif stage_features is not None:
            features = iter(stage_features)
        else:
            raise ValueError("Neither `pixel_values` nor `stage_features` are given; expected images, or features.")
        if labels is not None and look and labels.device.type == "cpu":
            self.check_labels(labels)

        exit_logits: list[torch.Tensor] = []
        exit_features: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        for head in self.exit_heads:
            pooled, logits, mask = head(next(features))
            exit_logits.append(logits)
            if mask is not None:
                masks.append(mask)
            if output_exit_features:
                exit_features.append(head.hint_projection(pooled))  # type: ignore[operator]
        for feature in features:  # the deepest, unless the network ends before it
            exit_logits.append(self.backbone.forward_head(feature))
        if output_exit_features and not self.config.truncated:
            # The deepest feature is only ever a target, and timm's own head stays the one that gives the logits.
            with torch.no_grad():
                exit_features.append(self.backbone.forward_head(feature.detach(), pre_logits=True))

        loss = None
        if labels is not None:
            loss = sum(self.loss_function(labels, logits, self.config) for logits in exit_logits)
        output = ScanImageClassifierOutput(
            loss=loss,
            logits=exit_logits[-1],
            exit_logits=tuple(exit_logits),
            ensemble_logits=torch.stack(exit_logits).mean(dim=0),
            exit_features=tuple(exit_features) if output_exit_features else None,
            attentions=tuple(masks) if masks and output_attentions else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def check_pixel_values(self, pixel_values: torch.Tensor, values: bool = False) -> None:
        """
        Raises a `ValueError` unless `pixel_values` is a batch of images that the network takes.

        Args:
            pixel_values (`torch.Tensor`): What to check.
            values (`bool`, *optional*, defaults to `False`): Whether to look for NaN and infinite pixels too, which
                waits for the device.
        """
        channels = self.config.num_channels
        expected = f"expected (batch_size, {channels}, height, width)"
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; {expected}. Prepare images with the model's "
                "image processor."
            )
        if 0 < min(pixel_values.shape[2:]) < self.stages[-1].reduction:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, and the backbone makes maps "
                f"{self.stages[-1].reduction} times smaller than the image; expected a height and width of at least "
                "that. Prepare images with the model's image processor, or set a larger `image_size`."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` holds {pixel_values.dtype}; expected floating-point numbers as the model's image "
                "processor makes them."
            )
        if not all(pixel_values.shape):
            raise ValueError(f"`pixel_values` is empty, of shape {tuple(pixel_values.shape)}; {expected}.")
        # One pass, and one number to wait for. (It also takes sums beyond float32 for infinite; no image has them.)
        if values and not math.isfinite(pixel_values.sum(dtype=torch.float32).item()):
            raise ValueError("`pixel_values` holds NaN or infinite values; expected finite ones. Check the images.")

    def check_labels(self, labels: torch.Tensor) -> None:
        """Raises a `ValueError` unless all labels are class indices. -100 is ignored by the loss, as everywhere."""
        if labels.ndim != 1 or labels.dtype != torch.long:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)} and holds {labels.dtype}; expected (batch_size,) class "
                "indices of torch.int64."
            )
        if labels.numel() and not ((labels == -100) | ((labels >= 0) & (labels < self.num_labels))).all():
            raise ValueError(
                f"`labels` holds values from {int(labels.min())} to {int(labels.max())}; expected class indices from "
                f"0 to {self.num_labels - 1}. Set `num_labels` to what the data has, or correct the labels."
            )

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        num_labels: int | None = None,
        exit_points: list[int | str] | None = None,
        **kwargs: Any,
    ) -> "ScanForImageClassification":
        """
        Equips a model of timm with early exits. Weights, label names and preprocessing are taken over, and the deepest
        exit answers as the model did; the early exits have to be trained.

        Args:
            model (`str` or `torch.nn.Module`): Name of a model as `timm.create_model` takes it, `hf-hub:` and
                `local-dir:` included, or a model that it made, which is copied. Weights on the Hub that are of a
                ResNet for 32x32 images, though they name timm's for larger ones, are recognised.
            pretrained (`bool`, *optional*, defaults to `False`): Whether timm loads weights for a name.
            num_labels (`int`, *optional*): Labels. Defaults to the model's own. With another number, its classifier
                starts anew.
            exit_points (`list[int | str]`, *optional*): As in [`ScanConfig`].
            kwargs: Further arguments of [`ScanConfig`]. A model that was not made with timm's defaults needs those
                that it was made with: `backbone_kwargs`, `num_channels`, `image_size`.

        Returns:
            [`ScanForImageClassification`]: in training mode.

        Raises:
            `ValueError`: if timm does not know the model, the arguments do not give what the model is, or it cannot be
                cut into stages.

        Example:

        ```python
        >>> import timm
        >>> from hf_scan import ScanForImageClassification

        >>> model = ScanForImageClassification.from_timm(timm.create_model("resnet18"), exit_points=["layer2"])
        >>> model.num_exits, model.config.id2label[0]
        (2, 'tench, Tinca tinca')
        ```
        """
        if isinstance(model, str):
            given = {"num_classes": num_labels, "in_chans": kwargs.get("num_channels")}
            given = {name: value for name, value in given.items() if value is not None}
            given |= kwargs.get("backbone_kwargs") or {}
            given = {**_size_argument(model, kwargs.get("image_size")), **given}
            try:
                source = _create_timm_model(model, pretrained, **given)
            except ValueError:
                source = _create_for_small_images(model, **given) if pretrained else None
                if source is None:
                    raise
        else:
            source = model
            if pretrained:
                raise ValueError("`pretrained` is for a model that is given by name; this one is given with weights.")
        cfg = getattr(source, "pretrained_cfg", None)
        if not isinstance(cfg, dict) or "architecture" not in cfg:
            raise ValueError(
                f"`model` is a {type(source).__name__} without timm's `pretrained_cfg`; expected a model that "
                "`timm.create_model` made, or the name of one."
            )

        own_labels = num_labels is None or num_labels == source.num_classes
        if "id2label" not in kwargs:
            names = _label_names(cfg, source.num_classes) if own_labels else None
            if names is not None:
                kwargs["id2label"] = dict(enumerate(names))
                kwargs["label2id"] = {name: index for index, name in enumerate(names)}
            else:
                kwargs["num_labels"] = num_labels or source.num_classes
        tagged = f"{cfg['architecture']}.{cfg.get('tag')}"
        config = ScanConfig(
            backbone=tagged if is_model_pretrained(tagged) else cfg["architecture"],
            exit_points=exit_points,
            **{"preprocessing": _preprocessing(cfg), **kwargs},
        )
        example = next(source.parameters())
        scan = cls(config).to(device=example.device, dtype=example.dtype)
        weights = source.state_dict()
        if not own_labels:
            classifiers = cfg["classifier"] if isinstance(cfg["classifier"], (tuple, list)) else [cfg["classifier"]]
            fresh = {
                name: value
                for name, value in scan.backbone.state_dict().items()
                if name.startswith(tuple(f"{classifier}." for classifier in classifiers))
            }
            weights |= fresh
        try:
            scan.backbone.load_state_dict(weights)
            if own_labels and not _answer_alike(scan.backbone, source, config):
                raise RuntimeError("the weights fit, and the answers differ")
        except RuntimeError as error:
            raise ValueError(
                f"The model is not what timm makes of {config.backbone!r} with {config.backbone_kwargs}, "
                f"{config.num_channels} channels and images of {config.image_size} pixels: {error}. Give the "
                "`backbone_kwargs`, `num_channels` and `image_size` that it was made with."
            ) from error
        return scan

    def fingerprint(self) -> str:
        """SHA-256 of the weights and buffers, with their names and types. Equal networks have the same."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
                exit_config = exit_config.update(costs=None)
            if other and exit_config.thresholds is not None:
                logger.warning(
                    "The network is not the one that was saved, so the checkpoint's thresholds do not belong to it "
                    "and are left out. Find others with `hf_scan.calibrate` once the model is trained."
                )
                exit_config = exit_config.update(thresholds=None, temperatures=None)
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
            card = self._card_of(repo_id, tags, include_code, token["token"]) if not subfolder else None
            if card is not None:
                card.save(Path(folder, "README.md"))
            given.setdefault("commit_message", "Upload model")
            # In the same commit, what an earlier push left: weights in another number of files, thresholds of theirs.
            given |= {"folder_path": folder, "path_in_repo": subfolder or None, "delete_patterns": OBSOLETE}
            return api.upload_folder(repo_id=repo_id, **given)

    def _card_of(self, repo_id: str, tags: list[str], include_code: bool, token: Any) -> Any:
        """A card for a repository that has none; its own, where tags are to be added; None to leave it as it is."""
        try:
            card = ModelCard.load(repo_id, token=token)
        except LocalEntryNotFoundError:
            return None
        except EntryNotFoundError:
            try:
                from hf_scan.model_card import create_model_card  # not with a checkpoint's own code
            except ImportError:
                return ModelCard.from_template(
                    ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=tags)
                )
            return create_model_card(self, None, {}, repo_id, tags=tags, include_code=include_code)
        except Exception as error:  # of the client, whose kinds differ between its versions
            logger.warning(f"The card of {repo_id} cannot be read ({error}), and is left as it is.")
            return None
        known = card.data.tags or []
        card.data.tags = list(dict.fromkeys([*known, *tags]))
        return card if card.data.tags != known else None

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


def _create_backbone(config: ScanConfig) -> Any:
    return _create_timm_model(config.backbone, num_classes=config.num_labels, **backbone_arguments(config))


def backbone_arguments(config: ScanConfig) -> dict[str, Any]:
    """What `timm.create_model` is given of a configuration, besides the number of classes."""
    arguments = {"in_chans": config.num_channels, **config.backbone_kwargs}
    return {**_size_argument(config.backbone, config.image_size), **arguments}


def _size_argument(name: str, image_size: int | None) -> dict[str, int]:
    """Only networks that are made for one size are told it. A name with a source is looked up by timm itself."""
    pretrained_cfg = timm.get_pretrained_cfg(name) if ":" not in name else None
    fixed = image_size is not None and pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    return {"img_size": image_size} if fixed else {}  # type: ignore[dict-item]


def _create_for_small_images(name: str, **kwargs: Any) -> Any:
    """
    The network of 32x32 images whose weights are on the Hub under the name of timm's for larger ones. (There are
    ResNets of that kind, whose authors changed the stem behind timm's back.)
    """
    if not name.startswith("hf-hub:"):
        return None
    cfg, architecture, arguments = load_model_config_from_hf(name.removeprefix("hf-hub:"))[:3]
    small = f"cifar_{architecture}"
    if not timm.is_model(small):
        return None
    settings = {"num_classes": cfg["num_classes"], **(arguments or {}), **kwargs}
    source = _create_timm_model(small, pretrained=True, pretrained_cfg=cfg, **settings)
    source.pretrained_cfg = {**source.pretrained_cfg, "architecture": small, "tag": None}
    return source


def _create_timm_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"timm cannot make {name!r} with {kwargs}: {error}. Correct the name or `backbone_kwargs`."
        ) from error


@torch.no_grad()
def _answer_alike(one: nn.Module, other: nn.Module, config: ScanConfig) -> bool:
    assert config.image_size is not None  # the network filled it in
    example = next(one.parameters())
    images = example.new_ones(1, config.num_channels, config.image_size, config.image_size)

    def answer(model: nn.Module) -> torch.Tensor:
        modes = [(module, module.training) for module in model.modules()]
        logits = model.eval()(images)
        for module, mode in modes:
            module.training = mode
        return logits

    return torch.allclose(answer(one), answer(other), rtol=1e-3, atol=1e-3)


def _preprocessing(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    settings = resolve_data_config(pretrained_cfg=pretrained_cfg)
    # As JSON gives them back.
    values = {name: settings[name] for name in sorted(PREPROCESSING_KEYS)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _label_names(pretrained_cfg: dict[str, Any], num_labels: int) -> list[str] | None:
    """What timm knows the classes of a checkpoint by, if it does."""
    names = pretrained_cfg.get("label_names")
    if names is None and (subset := infer_imagenet_subset({"num_classes": num_labels})):
        info = ImageNetInfo(subset)
        names = [info.label_name_to_description(synset) for synset in info.label_names()]
    return list(names) if names is not None and len(names) == num_labels else None


__all__ = ["ScanForImageClassification", "ScanImageClassifierOutput"]
