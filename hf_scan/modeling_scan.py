# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The network: a timm backbone with early exits, as a model of Transformers."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .adaptive import EXIT_CONFIG_NAME, AdaptiveInferenceMixin, ExitConfig
from .configuration_scan import ScanConfig
from .exit_heads import ExitHead
from .stages import cut_into_stages


logger = logging.get_logger(__name__)


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
            One of shape `(batch_size, feature_size)` per exit: what its last layer reads.
    """

    loss: torch.Tensor | None = None
    # Never None; a ModelOutput wants defaults.
    logits: torch.Tensor = None  # type: ignore[assignment]
    exit_logits: tuple[torch.Tensor, ...] = None  # type: ignore[assignment]
    ensemble_logits: torch.Tensor = None  # type: ignore[assignment]
    exit_features: tuple[torch.Tensor, ...] | None = None


class ScanForImageClassification(AdaptiveInferenceMixin, PreTrainedModel):
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
    accepts_loss_kwargs = False

    def __init__(self, config: ScanConfig) -> None:
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(f"`num_labels` is {config.num_labels}; a classifier needs at least 2.")
        self.num_labels = config.num_labels
        self.backbone = _create_backbone(config)
        # timm has just initialised its model in its own way, and Transformers must not do it again in another. On
        # the meta device nothing has been initialised: there the flag would leave raw memory behind.
        if not any(parameter.is_meta for parameter in self.backbone.parameters()):
            for module in self.backbone.modules():
                module._is_hf_initialized = True

        config.image_size = config.image_size or self.backbone.pretrained_cfg["input_size"][-1]
        self.stages = cut_into_stages(self.backbone, config.exit_points, config.image_size)
        deepest = self.stages[-1]
        self.exit_heads = nn.ModuleList(
            ExitHead(
                channels=stage.channels,
                stride=max(1, deepest.reduction // stage.reduction),
                feature_size=getattr(self.backbone, "head_hidden_size", self.backbone.num_features),
                num_labels=config.num_labels,
                attention_type=config.attention_type,
                classifier_type=config.classifier_type,
                head_width=config.head_width,
                channels_first=stage.channels_first,
            )
            for stage in self.stages[:-1]
        )
        config.exit_points = [stage.modules[-1] for stage in self.stages[:-1]]
        self.exit_config = ExitConfig()
        self.post_init()

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return len(self.stages)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # He et al., "Delving Deep into Rectifiers", 2015; Transformers' default of N(0, 0.02) is for transformers.
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # PyTorch's own
        # Buffers that no checkpoint holds come out of the meta device as raw memory.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]

    def run_stage(self, index: int, feature: torch.Tensor) -> torch.Tensor:
        """The stage's feature, from that of the stage before or, for the first, from the images."""
        return self.stages[index].run(self.backbone, feature)

    def run_exit(self, index: int, feature: torch.Tensor) -> torch.Tensor:
        """An exit's logits `(batch_size, num_labels)` from its stage's feature."""
        if index == self.num_exits - 1:
            return self.backbone.forward_head(feature)
        return self.exit_heads[index](feature)[1]

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_exit_features: bool = False,
        return_dict: bool | None = None,
    ) -> ScanImageClassifierOutput | tuple[Any, ...]:
        """
        Runs every stage and every exit.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Class indices, for the loss.
            output_exit_features (`bool`, *optional*, defaults to `False`): Whether to return each exit's feature.
            return_dict (`bool`, *optional*): Whether to return an output object rather than a tuple.

        Raises:
            `ValueError`: if the images are not what the network takes. On the CPU, where looking costs no transfer,
                also if pixels are NaN or infinite or labels are out of range.
        """
        look = pixel_values.device.type == "cpu" and not torch.compiler.is_compiling()
        self.check_pixel_values(pixel_values, values=look)
        if labels is not None and look:
            self.check_labels(labels)

        exit_logits: list[torch.Tensor] = []
        exit_features: list[torch.Tensor] = []
        feature = pixel_values
        for index, head in enumerate(self.exit_heads):
            feature = self.run_stage(index, feature)
            pooled, logits = head(feature)
            exit_features.append(pooled)
            exit_logits.append(logits)
        feature = self.run_stage(self.num_exits - 1, feature)
        exit_logits.append(self.backbone.forward_head(feature))
        if output_exit_features:
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
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` holds {pixel_values.dtype}; expected floating-point numbers as the model's image "
                "processor makes them."
            )
        if not all(pixel_values.shape):
            raise ValueError(f"`pixel_values` is empty, of shape {tuple(pixel_values.shape)}; {expected}.")
        if values and not torch.stack(pixel_values.aminmax()).isfinite().all():
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
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        exit_config: ExitConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], and loads the exit configuration beside the weights.

        Args:
            exit_config ([`ExitConfig`], *optional*): Used instead of the checkpoint's `exit_config.json`.

        Raises:
            `OSError`: if there are no weights, or they are damaged.
            `ValueError`: if the configuration is another model's, the weights lack some of the backbone's, or the
                exit configuration is not valid.
        """
        loading_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True  # Transformers would fall back to a pickle
        try:
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
        if exit_config is None:
            names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            exit_config = ExitConfig.from_pretrained(
                pretrained_model_name_or_path, **{name: kwargs[name] for name in names if name in kwargs}
            )
            if exit_config.thresholds is not None and any(
                info[kind] for kind in ("mismatched_keys", "missing_keys", "unexpected_keys")
            ):
                logger.warning(
                    "The network is not the one that was saved, so the checkpoint's thresholds do not belong to it "
                    "and are left out. Find others with `hf_scan.calibrate` once the model is trained."
                )
                exit_config = ExitConfig(fallback=exit_config.fallback)
        if exit_config.thresholds is not None:
            exit_config.resolve(model.num_exits)
        model.exit_config = exit_config
        return (model, info) if loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As [`~transformers.PreTrainedModel.save_pretrained`], with `exit_config.json` beside the weights."""
        if self.exit_config.thresholds is not None:
            self.exit_config.resolve(self.num_exits)  # before anything is written
        names = ("repo_id", "commit_message", "private", "create_pr", "revision", "commit_description", "tags")
        hub_kwargs = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            if self.exit_config != ExitConfig():
                self.exit_config.save_pretrained(save_directory)
            else:
                # Thresholds that were found for other weights must not be loaded with these.
                Path(save_directory, EXIT_CONFIG_NAME).unlink(missing_ok=True)
        if push_to_hub:
            # Not left to `super()`, which would upload before the exit configuration is written.
            hub_kwargs.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(token=kwargs.get("token"), **hub_kwargs)


def _create_backbone(config: ScanConfig) -> Any:
    kwargs = dict(config.backbone_kwargs)
    try:
        pretrained_cfg = timm.get_pretrained_cfg(config.backbone)
        if config.image_size is not None and pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
            kwargs.setdefault("img_size", config.image_size)
        return timm.create_model(
            config.backbone, pretrained=False, num_classes=config.num_labels, in_chans=config.num_channels, **kwargs
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"timm cannot make {config.backbone!r} with {kwargs}: {error}. Correct `backbone_kwargs`."
        ) from error


__all__ = ["ScanForImageClassification", "ScanImageClassifierOutput"]
