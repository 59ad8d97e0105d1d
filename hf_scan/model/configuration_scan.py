# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Describe a network: [`ScanConfig`]."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import field
from typing import Any, Literal

import timm
import torch
from huggingface_hub.dataclasses import strict
from timm.models import build_model_with_cfg, is_model
from transformers import PreTrainedConfig

# Registers the CIFAR networks with timm. In this form, Transformers sees that a checkpoint with code needs the file.
from .cifar_backbones import CifarResNet  # noqa: F401
from .named_errors import shown
from .torchvision_backbones import check_torchvision
from .transformers_backbones import check_family


# A configuration is untrusted data. These arguments would make timm download, read a path or load a pickle. They are
# taken from timm's own signatures, so that an argument that a release of timm adds is covered too.
REFUSED_BACKBONE_ARGUMENTS = frozenset(
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
) | {
    "model_name",
    "transformers_weights",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}

PREPROCESSING_KEYS = frozenset({"mean", "std", "crop_pct", "crop_mode", "interpolation"})
PREPROCESSING_NAMES = {  # in `timm.data`
    "crop_mode": ("center", "squash", "border"),
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
}

# Size limits for untrusted configurations.
LARGEST = {
    "num_labels": 1_000_000,
    "head_width": 4_096,
    "head_feature_size": 4_096,
    "num_channels": 4_096,
    "image_size": 16_384,
}
LARGEST_ARGUMENT = 65_536
MOST_EXITS = 256
DEEPEST = 2_048  # blocks, in all stages together

MODULE_NAME = re.compile(r"[\w-]{1,100}(\.[\w-]{1,100}){0,20}")

# Arguments that other fields of the configuration set, or that a network which runs stage by stage cannot use.
OWN_BACKBONE_ARGUMENTS = {
    "num_classes": "set `num_labels`",
    "in_chans": "set `num_channels`",
    "features_only": "leave it out: the exits need the classifier",
}


def _check_no_sources(values: dict[str, Any]) -> None:
    refused = sorted(REFUSED_BACKBONE_ARGUMENTS.intersection(values))
    if refused:
        raise ValueError(
            f"The configuration names {refused}, which would make timm fetch or read weights; a ScanConfig only "
            "describes the architecture. Remove these keys and load weights with `from_pretrained`."
        )


def _check_numbers(values: dict[str, Any]) -> None:
    if not isinstance(values.get("num_labels", 2), int):
        raise ValueError(f"`num_labels` is {shown(values['num_labels'])}; expected a whole number.")
    for name, largest in LARGEST.items():
        value = values.get(name)
        least = 0 if name == "num_labels" else 1  # the network itself asks for two labels
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not least <= number <= largest:
                raise ValueError(
                    f"`{name}` is {value}; expected a whole number of at least {least} and at most {largest}."
                )
    for name, value in values["backbone_kwargs"].items():
        if any(word in name for word in ("layer", "depth", "block")) and sum(map(abs, _numbers(value))) > DEEPEST:
            raise ValueError(
                f"`backbone_kwargs` gives {name!r} {value}, more than {DEEPEST} in all; such a network would take too "
                "long to build. Correct it."
            )
        if any(not abs(number) <= LARGEST_ARGUMENT for number in _numbers(value)):
            raise ValueError(
                f"`backbone_kwargs` gives {name!r} a number beyond {LARGEST_ARGUMENT}; such a network would not fit "
                "into memory. Correct it."
            )


def _check_kernels(values: dict[str, Any]) -> None:
    """Refuse names with a slash: they are repositories, whose code Transformers would fetch and run."""
    for name, value in values.items():
        if not name.strip("_").startswith(("attn_implementation", "experts_implementation")) or value is None:
            continue
        if not isinstance(value, str) or "/" in value:
            raise ValueError(
                f"`{name}` names the kernel {value!r}, which Transformers would fetch and run; expected a name such "
                "as 'eager'. Remove it."
            )


def _check_dtype(values: dict[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"`{name}` is {shown(value)}; expected a floating-point type of PyTorch such as 'float32'."
            )


def _check_quantization(values: dict[str, Any]) -> None:
    settings = values.get("quantization_config")
    if settings is not None and not isinstance(settings, dict) and not hasattr(settings, "to_dict"):
        raise ValueError(
            f"`quantization_config` is {shown(settings)}; expected the settings of a quantisation as a dictionary, or "
            "none."
        )


def _check_labels(values: dict[str, Any]) -> None:
    names = values.get("id2label")
    if names == {}:
        raise ValueError("`id2label` is empty; expected the name of each label. Leave it out to set `num_labels`.")
    if names is not None:
        keys = [str(key) for key in names] if isinstance(names, dict) else []
        if sorted(keys) != sorted(map(str, range(len(keys)))) or not isinstance(names, dict):
            raise ValueError(
                "`id2label` is not a dictionary from 0, 1, 2 and so on to the name of each label. Correct it, or "
                "leave it out and set `num_labels`."
            )
        if any(not isinstance(label, (str, int)) for label in names.values()):
            raise ValueError("`id2label` holds a label that is no text. Correct it.")
    indices = values.get("label2id")
    if indices is not None and not (
        isinstance(indices, dict) and all(isinstance(index, (int, str)) for index in indices.values())
    ):
        raise ValueError("`label2id` is not a dictionary from the name of each label to its index. Correct it.")


def _check_exit_points(exit_points: list[int | str] | None) -> None:
    if exit_points is not None and len(exit_points) > MOST_EXITS:
        raise ValueError(f"`exit_points` has {len(exit_points)} entries; expected at most {MOST_EXITS}.")
    for point in exit_points or []:
        if isinstance(point, str) and not MODULE_NAME.fullmatch(point):
            shown = repr(point)[:100]
            raise ValueError(
                f"`exit_points` holds {shown}; expected indices of taps, and names of modules such as 'layer3.2'."
            )


def _check_source(source: str, name: str, arguments: dict[str, Any]) -> None:
    if source == "timm":
        _check_backbone(name)
    _check_backbone_kwargs(arguments)
    if source == "torchvision":
        check_torchvision(name, arguments)
    elif source == "transformers":
        check_family(name, arguments)
    elif source == "custom" and (arguments or not MODULE_NAME.fullmatch(name)):
        raise ValueError(
            "`backbone_source` is 'custom', and `backbone` or `backbone_kwargs` say more than the name of a class. "
            "Such a network is made of a module, by `from_module`."
        )


def _check_backbone(name: str) -> None:
    shown = repr(name if len(name) <= 100 else f"{name[:100]}...")
    if any(sign in name for sign in ":/\\"):
        raise ValueError(
            f"`backbone` is {shown}, which names a source or a path; expected the name of a model in timm's registry "
            "such as 'resnet50'. Weights are loaded with `from_pretrained`."
        )
    if not is_model(name):
        raise ValueError(
            f"`backbone` is {shown}, which timm {timm.__version__} does not know. `timm.list_models()` lists the "
            "names it knows; a newer timm may know more."
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(
            f"`backbone` is {shown}, whose pretrained tag timm {timm.__version__} does not know. Leave the tag out, "
            "or choose one that `timm.list_pretrained()` lists."
        ) from error


def _check_backbone_kwargs(arguments: dict[str, Any]) -> None:
    refused = sorted(REFUSED_BACKBONE_ARGUMENTS.intersection(arguments))
    if refused:
        raise ValueError(
            f"`backbone_kwargs` names {refused}, which would make timm fetch or read weights, or change how it "
            "builds; only arguments of the architecture are expected. Remove these keys."
        )
    for name, instead in OWN_BACKBONE_ARGUMENTS.items():
        if name in arguments:
            raise ValueError(f"`backbone_kwargs` names {name!r}, which is not expected there: {instead}.")


def _check_preprocessing(values: dict[str, Any]) -> None:
    if unknown := sorted(set(values) - PREPROCESSING_KEYS):
        raise ValueError(f"`preprocessing` names {unknown}; expected some of {sorted(PREPROCESSING_KEYS)}.")
    for name in ("mean", "std"):
        numbers = values.get(name, [0.5])
        least = 0 if name == "mean" else 1e-4
        if (
            not isinstance(numbers, (list, tuple))
            or not numbers
            or not all(isinstance(number, (int, float)) and least <= number <= 255 for number in numbers)
        ):
            raise ValueError(
                f"`preprocessing` gives {name!r} as {numbers!r}; expected a list of numbers from {least} to 255, one "
                "for each channel."
            )
    crop = values.get("crop_pct", 1.0)
    if not isinstance(crop, (int, float)) or not 0.01 <= crop <= 10:
        raise ValueError(f"`preprocessing` gives 'crop_pct' as {crop!r}; expected a number from 0.01 to 10.")
    for name, known in PREPROCESSING_NAMES.items():
        if name in values and values[name] not in known:
            raise ValueError(f"`preprocessing` gives {name!r} as {values[name]!r}; expected one of {list(known)}.")


def _check_problem_type(problem_type: object) -> None:
    expected = (None, "single_label_classification", "multi_label_classification")
    if problem_type not in expected:
        raise ValueError(
            f"`problem_type` is {problem_type!r}; expected one of {expected}: exits are scored by how certain labels "
            "are. For regression, train the timm model without exits."
        )


@strict
class ScanConfig(PreTrainedConfig):
    r"""
    The configuration of a [`ScanForImageClassification`]: a timm backbone, the places where it has early exits, and
    the kind of exit head that stands there.

    Args:
        backbone (`str`, *optional*, defaults to `"cifar_resnet18"`):
            Name of a model in timm's registry, with or without a pretrained tag. Sources such as `hf-hub:` or
            `local-dir:` are refused: a configuration never makes anything be downloaded or read.
        backbone_source (`str`, *optional*, defaults to `"timm"`):
            Where the backbone is from: `"timm"`; `"torchvision"`, with a name such as `"resnet18"`; `"transformers"`,
            with the family `"resnet"`, `"convnext"` or `"vit"`; or `"custom"`, a module of the user's own, which no
            configuration can make and which is not saved. [`~ScanForImageClassification.from_module`] converts what
            is trained.
        backbone_kwargs (`dict[str, Any]`, *optional*, defaults to `{}`):
            Further architecture arguments for `timm.create_model`, e.g. `{"drop_path_rate": 0.1}`; for
            `torchvision.models.get_model`; or for the family's configuration in Transformers.
        exit_points (`list[int | str]`, *optional*):
            Where the early exits are, from shallow to deep: indices into the backbone's `feature_info`, or names of
            modules. Besides those that stand there, it may be any module that the forward pass runs once on the way
            and whose output is a map or a grid of tokens, such as `"layer3.2"` or `"blocks.4.1"`. The deepest exit is
            the backbone's own classifier and is not listed. Defaults to every tap but the last, without those whose
            map is more than 8 times finer than the last one's; on a network whose maps are all of one size, to a
            quarter, half and three quarters of the depth.
        attention_type (`str`, *optional*, defaults to `"nearest"`):
            Attention module of each early exit: `"conv"` (the paper's), `"nearest"` (cheap: a mask at half the
            resolution, enlarged by repeating values, which ONNX Runtime does in the layout of its convolutions),
            `"separable"` (the same, enlarged bilinearly) or `"none"`.
        classifier_type (`str`, *optional*, defaults to `"separable"`):
            Shallow classifier of each early exit: `"conv"` (the paper's), `"chain"` (attention and classifier see the
            feature at `head_width` and at most four times the deepest map's height and width; two or more separable
            convolutions double the channels on the way down to it) or `"separable"` (cheaper: at most twice, and at
            least one).
        head_width (`int` or `list[int]`, *optional*):
            Channels at which heads with `"chain"` and `"separable"` classifiers work: one number for all early exits,
            or one each. Defaults to 64; with `"chain"`, to what a tenth of the backbone's MACs pays for
            ([`~hf_scan.model.exit_heads.head_widths`]). The network fills in what it chose.
        head_feature_size (`int`, *optional*, defaults to 256):
            Width of the feature that the last layer of such a head reads, if the deepest exit's is not narrower.
        truncated (`bool`, *optional*, defaults to `False`):
            Whether the network ends at its one exit point, without what is behind it: a small static network, as
            [`~ScanForImageClassification.truncate`] makes it.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input image.
        image_size (`int`, *optional*):
            Height and width of the input image in pixels. Defaults to what the backbone was made for, if it says so.
        preprocessing (`dict[str, Any]`, *optional*):
            How images are prepared, in timm's words: `mean`, `std`, `crop_pct`, `crop_mode` and `interpolation`.
            Defaults to how those were that the backbone was made for.
        problem_type (`str`, *optional*):
            `"multi_label_classification"` for several labels an image: labels of shape `(batch_size, num_labels)`
            between 0 and 1, the binary cross-entropy at every exit, and the criterion `"label_confidence"`. Otherwise
            one label of an image is right.

    Raises:
        `ValueError`: if `backbone` is not known to its source, or `backbone_kwargs` or a further argument names a
            source of weights.
        `huggingface_hub.errors.StrictDataclassFieldValidationError`: if a field is of another type or kind.

    Example:

    ```python
    >>> from hf_scan import ScanConfig, ScanForImageClassification

    >>> config = ScanConfig(backbone="cifar_resnet20", num_labels=10)
    >>> model = ScanForImageClassification(config)
    >>> model.config.exit_points
    ['layer1', 'layer2']
    ```
    """

    model_type = "scan"
    # So that `EvalPrediction.predictions` of a plain `Trainer` is the array of logits that its users expect.
    keys_to_ignore_at_inference = ["exit_logits", "ensemble_logits", "exit_features", "hidden_states", "attentions"]

    backbone: str = "cifar_resnet18"
    backbone_source: Literal["timm", "torchvision", "transformers", "custom"] = "timm"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    exit_points: list[int | str] | None = None
    attention_type: Literal["separable", "nearest", "conv", "none"] = "nearest"
    classifier_type: Literal["separable", "chain", "conv"] = "separable"
    head_width: int | list[int] | None = None
    head_feature_size: int = 256
    truncated: bool = False
    num_channels: int = 3
    image_size: int | None = None
    preprocessing: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Before Transformers makes names for so many labels, and not as `validate_*` methods of a strict dataclass,
        # whose errors are no `ValueError`.
        values = {**vars(self), **kwargs}
        _check_no_sources(kwargs)
        _check_numbers(values)
        _check_kernels(values)
        _check_dtype(values)
        _check_quantization(values)
        _check_labels(values)
        super().__post_init__(**kwargs)
        _check_exit_points(self.exit_points)
        _check_source(self.backbone_source, self.backbone, self.backbone_kwargs)
        _check_preprocessing(self.preprocessing or {})
        _check_problem_type(self.problem_type)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Transformers only warns when a checkpoint is of another kind, then builds a network of defaults.
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a {shown(model_type)} model, and {cls.__name__} reads those of "
                f"model_type {cls.model_type!r}. Load it with `AutoConfig` or `AutoModelForImageClassification`."
            )
        _check_labels(config_dict)  # before older versions of Transformers check their types in other words
        if "head_width" in config_dict:  # of a network whose heads are there, and which may be older than this field
            config_dict = {"head_feature_size": 512, **config_dict}
        return super().from_dict(config_dict, **kwargs)


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in a value of JSON."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


__all__ = ["ScanConfig"]
