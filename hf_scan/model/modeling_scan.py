# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The network: a timm backbone with early exits, as a model of Transformers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .adaptive import prepare_images
from .adaptive_stream import AdaptiveStreamMixin
from .backbone import create_backbone, fill_in
from .compiled_stages import CompiledStages
from .configuration_scan import ScanConfig
from .exit_config import ExitConfig
from .exit_heads import ExitHead, head_widths
from .hub_mixin import HubMixin
from .input_checks import InputChecksMixin
from .module_conversion import ModuleConversionMixin
from .stages import BackboneHead, Stage, StageState, cut_network, parameters_by_stage
from .timm_conversion import TimmConversionMixin
from .training_watch import watch_training
from .truncation import TruncationMixin
from .weight_files import fingerprint_of


@dataclass
class ScanImageClassifierOutput(ModelOutput):
    """
    Output of [`ScanForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Sum over the exits of the cross-entropy.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): The deepest exit's.
        exit_logits (`tuple[torch.FloatTensor]`): One of the same shape per exit, from shallow to deep.
        ensemble_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Mean over the exits.
        exit_features (`tuple[torch.FloatTensor]`, *optional*, returned when `output_exit_features=True`):
            One of shape `(batch_size, feature_size)` per exit: what the backbone's last layer reads, and of each early
            exit the same, brought to that width where it is narrower.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
            One per exit, as [`~ScanForImageClassification.extract_features`] returns them: the map that each early
            exit looks at, and what the backbone's own head does.
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
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class StageLayer(GradientCheckpointingLayer):
    """
    A layer of Transformers that runs one stage of a backbone, and has no weights of its own. With gradient
    checkpointing, the stage's intermediate values are computed anew in the backward pass.
    """

    def forward(self, anchor: torch.Tensor, *values: Any, stage: Stage, backbone: nn.Module) -> tuple[Any, ...]:
        """
        Run the stage.

        Args:
            anchor (`torch.Tensor`): A tensor that requires gradients. PyTorch's reentrant checkpoints give none to the
                weights unless an input has them, and images do not.
            values: What the stage before returned.
            stage ([`Stage`]): The stage.
            backbone (`torch.nn.Module`): The backbone that it is cut from.
        """
        return stage.forward(backbone, *values)


class ScanForImageClassification(
    HubMixin,
    TimmConversionMixin,
    ModuleConversionMixin,
    TruncationMixin,
    InputChecksMixin,
    AdaptiveStreamMixin,
    PreTrainedModel,
):
    """
    An image classifier, of timm or another library, with early exits: Zhang et al., "SCAN: A Scalable Neural Networks
    Framework Towards Compact and Efficient Models", NeurIPS 2019.

    `model.backbone` is the classifier itself, with its own modules and parameter names, and answers as the deepest
    exit does. `model.exit_heads` holds the early exits.

    Args:
        config ([`ScanConfig`]): What the network is. Fields that are left to defaults are filled in, so that a saved
            configuration says them.
        backbone (`torch.nn.Module`, *optional*): The classifier, where no configuration describes it.
            [`~ScanForImageClassification.from_module`] gives it.

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

    def __init__(self, config: ScanConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(f"`num_labels` is {config.num_labels}; a classifier needs at least 2.")
        self.num_labels = config.num_labels
        self.backbone_frozen = False
        self.compiled: CompiledStages | None = None  # set by `compile_stages`
        self.all_modules: tuple[nn.Module, ...] | None = None  # set by `has_training_modules`
        self.backbone: Any = create_backbone(config) if backbone is None else backbone
        # timm has just initialised its model in its own way, and Transformers must not do it again in another. On
        # the meta device nothing has been initialised: there the flag would leave raw memory behind.
        if not any(parameter.is_meta for parameter in self.backbone.parameters()):
            for module in self.backbone.modules():
                module._is_hf_initialized = True

        fill_in(config, self.backbone)
        stages, head = self.cut(self.backbone)
        if head.num_labels not in (None, config.num_labels):
            raise ValueError(
                f"`num_labels` is {config.num_labels}, and {type(self.backbone).__name__} answers with "
                f"{head.num_labels}. Correct it, or `id2label`."
            )
        self.backbone_head: BackboneHead = head
        deepest = stages[-1]
        feature_size = head.feature_size
        strides = [max(1, deepest.reduction // stage.reduction) for stage in stages[:-1]]
        config.head_width = head_widths(
            config, [stage.channels for stage in stages[:-1]], strides, feature_size, self.weights_used(stages)
        )
        with init.no_init_weights():  # `post_init` does it
            self.exit_heads = nn.ModuleList(
                ExitHead(
                    channels=stage.channels,
                    stride=stride,
                    feature_size=feature_size,
                    num_labels=config.num_labels,
                    attention_type=config.attention_type,
                    classifier_type=config.classifier_type,
                    head_width=width,
                    head_feature_size=config.head_feature_size,
                )
                for stage, stride, width in zip(stages[:-1], strides, config.head_width)
            )
        config.exit_points = [stage.name for stage in stages[:-1]]
        self.stages = self.truncate_in_place(stages) if config.truncated else stages
        self.stage_layers = nn.ModuleList(StageLayer() for _ in self.stages)
        self.exit_config = ExitConfig()
        self.training_recorded = False  # set by a trainer that records what the network is trained on
        self.exits_reached: set[int] = set()  # by the gradients of the last training step
        self.model_tags = [
            "early-exit",
            "scan",
            config.backbone_source,
            "hf_scan",
        ]  # of the card; Transformers adds to the list
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("stages", "backbone_head", "compiled", "all_modules")
        return {name: value for name, value in self.__dict__.items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.compiled = None
        self.all_modules = None
        # Functions of the backbone, which no pickle holds.
        if not self.config.truncated:
            self.stages, self.backbone_head = self.cut(self.backbone)
            return
        with torch.device("meta"):
            whole = create_backbone(self.config)
        stages, self.backbone_head = self.cut(whole)
        self.stages = self.truncate_in_place(stages)

    def cut(self, backbone: nn.Module) -> tuple[list[Stage], BackboneHead]:
        """Cut a backbone, which is this network's before any part is removed, at the exit points."""
        size = self.config.image_size
        assert size is not None  # the network filled it in
        return cut_network(backbone, self.config.exit_points, (self.config.num_channels, size, size))

    def weights_used(self, stages: list[Stage]) -> float:
        """Return the number of multiplications by weights for one pixel of the deepest map, in convolutions."""
        total = 0.0
        for stage, parameters in zip(stages, parameters_by_stage(self.backbone, stages)):
            weights = sum(parameter.numel() for parameter in parameters.values())
            total += weights * (stages[-1].reduction / stage.reduction) ** 2
        return total

    @property
    def num_exits(self) -> int:
        """Return the number of exits, the backbone's own classifier included."""
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
        Train only the early exits from now on. The backbone gets no gradient, and it stays in evaluation mode when the
        model is put into training mode, so that its batch norm statistics and its answers do not change.

        Args:
            frozen (`bool`, *optional*, defaults to `True`): `False` trains it again.
        """
        self.backbone.requires_grad_(not frozen)
        self.backbone_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> "ScanForImageClassification":
        super().train(mode)
        self.all_modules = None
        if self.backbone_frozen:
            self.backbone.eval()
        if mode:
            self.compiled = None
        return self

    def has_training_modules(self) -> bool:
        """Return whether any module is in training mode, also if one was put into it alone."""
        if self.all_modules is None:  # to list them takes a hundred times as long as to look at them
            self.all_modules = tuple(self.modules())
        return any(module.training for module in self.all_modules)

    def _apply(self, *args: Any, **kwargs: Any) -> "ScanForImageClassification":
        super()._apply(*args, **kwargs)
        if self.compiled is not None:
            self.compiled.refold(self.exit_heads)
        return self

    def run_stage(self, index: int, state: StageState) -> StageState:
        """
        Run a stage of the backbone.

        Args:
            index (`int`): Which one.
            state ([`StageState`]): What the stage before returned, or `StageState.from_images(pixel_values)`.
        """
        stage = self.stages[index]
        layer = self.stage_layers[index]
        if layer.gradient_checkpointing and self.training:
            anchor = torch.ones((), requires_grad=not self.backbone_frozen)
            values = layer(anchor, *state.values, stage=stage, backbone=self.backbone)
        else:
            forward = stage.forward if self.compiled is None else self.compiled.stages[index]
            values = forward(self.backbone, *state.values)
        return state.after(values, stage.batched)

    def _stage_features(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the feature of each stage as its head takes it, and at last the one for the backbone's own head."""
        state = StageState.from_images(pixel_values)
        for index, stage in enumerate(self.stages):
            state = self.run_stage(index, state)
            yield stage.feature(state) if index < len(self.exit_heads) else state.values[0]

    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Run the backbone only, and return its features.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.

        Returns:
            `tuple[torch.Tensor]`: what each early exit looks at, `(batch_size, channels, height, width)`, and what the
            backbone's own head does. [`~ScanForImageClassification.forward`] takes it as `stage_features`.
        """
        return tuple(self._stage_features(prepare_images(self, pixel_values)))

    def run_backbone_head(self, feature: Any, pre_logits: bool = False) -> torch.Tensor:
        """Return the logits of the backbone's own classifier from its last map, or what its last layer reads."""
        return self.backbone_head(self.backbone, feature, pre_logits)

    def run_exit(self, index: int, state: StageState) -> torch.Tensor:
        """Return an exit's logits `(batch_size, num_labels)` from what its stage returned."""
        if index == len(self.exit_heads):
            compiled = None if self.compiled is None else self.compiled.deepest_head
            logits: torch.Tensor = compiled(state.values[0]) if compiled else self.run_backbone_head(state.values[0])
        else:
            head = self.exit_heads[index] if self.compiled is None else self.compiled.heads[index]
            _, logits, _ = head(self.stages[index].feature(state))
        return logits

    def compile_stages(self, **kwargs: Any) -> None:
        """
        Compile each stage and each head by itself with `torch.compile`, for adaptive inference, whose batches shrink:
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
        deepest_head = None if self.config.truncated else self.run_backbone_head
        self.compiled = CompiledStages(self.stages, self.exit_heads, deepest_head, **kwargs)

    def export_onnx(self, folder: Any, **kwargs: Any) -> None:
        """
        Export the network to ONNX, for [`~hf_scan.runtime.ORTScanForImageClassification`] and other runtimes.

        Args:
            folder (`str` or `Path`): Where to.
            kwargs: For [`~hf_scan.runtime.export_onnx`], which explains all: `calibration_dataset`,
                `include_preprocessing` and `opset`.

        Raises:
            `ImportError`: if the network came with code of its own and `hf_scan` is not installed.
        """
        # This file travels with checkpoints, and the export does not.
        try:
            runtime = import_module("hf_scan.runtime")
        except ModuleNotFoundError as error:
            raise ImportError(f"The export to ONNX needs hf_scan ({error}). `pip install 'hf_scan[onnx]'`.") from error
        runtime.export_onnx(self, folder, **kwargs)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        stage_features: tuple[torch.Tensor, ...] | None = None,
        output_exit_features: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ScanImageClassifierOutput | tuple[Any, ...]:
        """
        Run every stage and every exit.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images, which are
                moved to the model's device and dtype.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Class indices, for the loss. With several
                labels an image, `(batch_size, num_labels)` numbers from 0 to 1.
            stage_features (`tuple[torch.Tensor]`, *optional*): In place of images, what
                [`~ScanForImageClassification.extract_features`] returned for them. Then only the heads are run.
            output_exit_features (`bool`, *optional*, defaults to `False`): Whether to return each exit's feature.
            output_attentions (`bool`, *optional*): Whether to return the attention mask of each early exit. Defaults
                to `config.output_attentions`.
            output_hidden_states (`bool`, *optional*): Whether to return the feature of each stage. Defaults to
                `config.output_hidden_states`.
            return_dict (`bool`, *optional*): Whether to return an output object rather than a tuple.

        Raises:
            `ValueError`: if the images are not what the network takes. On the CPU, where looking costs no transfer,
                also if pixels are NaN or infinite or labels are out of range.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        check_values = not torch.compiler.is_compiling()
        if pixel_values is not None:
            pixel_values = prepare_images(self, pixel_values)
            if check_values and pixel_values.device.type == "cpu":
                self.check_pixel_values(pixel_values, values=True)
            features = self._stage_features(pixel_values)
        elif stage_features is not None:
            features = (feature.to(self.device, self.dtype) for feature in stage_features)
        else:
            raise ValueError("Neither `pixel_values` nor `stage_features` are given; expected images, or features.")
        if labels is not None:
            labels = self.prepare_labels(labels)

        exit_logits: list[torch.Tensor] = []
        exit_features: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        hidden_states: list[torch.Tensor] = []
        for index, feature in enumerate(features):
            if output_hidden_states:
                hidden_states.append(feature)
            if index < len(self.exit_heads):
                head = self.exit_heads[index]
                pooled, logits, mask = head(feature)
                exit_logits.append(logits)
                if mask is not None:
                    masks.append(mask)
                if output_exit_features:
                    exit_features.append(head.hint_projection(pooled))  # type: ignore[operator]
                continue
            exit_logits.append(self.run_backbone_head(feature))
            if output_exit_features:
                # The deepest feature is only ever a target, and the own head stays the one that gives the logits.
                with torch.no_grad():
                    exit_features.append(self.run_backbone_head(feature.detach(), pre_logits=True))

        if self.training and torch.is_grad_enabled() and check_values:
            watch_training(self, exit_logits)
        loss = None
        if labels is not None:
            loss = sum(self.loss_function(labels, logits, self.config) for logits in exit_logits)
        output = ScanImageClassifierOutput(
            loss=loss,
            logits=exit_logits[-1],
            exit_logits=tuple(exit_logits),
            ensemble_logits=torch.stack(exit_logits).mean(dim=0),
            exit_features=tuple(exit_features) if output_exit_features else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(masks) if masks and output_attentions else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights and buffers with their names and types. Equal networks have the same."""
        return fingerprint_of(sorted(self.state_dict().items()))


__all__ = ["ScanForImageClassification", "ScanImageClassifierOutput"]
