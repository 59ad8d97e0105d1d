# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Export a network to ONNX as a whole, cut it into stages, and compare them with PyTorch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..costs.measure import count_macs, count_parameters
from ..extras import require_extra
from ..model.evaluation_mode import evaluating
from ..model.stages import StageState
from .compare import BATCH_SIZES, compare_with_itself, compare_with_pytorch
from .manifest import ONNX_FOLDER, Manifest
from .numpy_rule import RULE, ExitSettings, plan_steps
from .staged_export import finish, old_entries, staged_export


if TYPE_CHECKING:
    import onnx

    from ..model.modeling_scan import ScanForImageClassification


INT8_FOLDER = "int8"


class _AllStages(nn.Module):
    """A module that returns every exit's logits and the state after each stage, for the exporter."""

    def __init__(self, model: "ScanForImageClassification", preprocessing: dict[str, Any] | None) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.preprocessing is None:
            return pixel_values
        mean, std = (torch.tensor(self.preprocessing[name])[:, None, None] for name in ("mean", "std"))
        return pixel_values.permute(0, 3, 1, 2).float() * (1 / (255 * std)) - mean / std

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = StageState.from_images(self.images(pixel_values))
        outputs: list[torch.Tensor] = []
        for index, stage in enumerate(self.model.stages):
            state = stage.run(self.model.backbone, state)
            if index == len(self.model.exit_heads):
                return (*outputs, self.model.run_backbone_head(state.values[0]))
            outputs.append(self.model.exit_heads[index](stage.feature(state))[1])
            if index < self.model.num_exits - 1:
                # Values that do not depend on the images are constants of the next stage, which the runtime folds.
                own = [value for value, batched in zip(state.values, state.batched) if batched]
                outputs += [value for value in tree_leaves(own) if isinstance(value, torch.Tensor)]
        return tuple(outputs)


def export_onnx(
    model: "ScanForImageClassification",
    folder: str | os.PathLike[str],
    *,
    calibration_dataset: Any = None,
    include_preprocessing: bool = False,
    opset: int | None = None,
) -> None:
    """
    Export a network to ONNX, for [`ORTScanForImageClassification`] and any other runtime.

    The folder gets `onnx/` with one graph per stage, `adaptive.onnx` for a single image, `plain.onnx`, their shared
    `weights.bin` and `manifest.json`, and beside it configuration, exit configuration, image processor and card. With
    a `calibration_dataset`, the subfolder `int8` holds the same network in 8 bits. Thresholds and guarantees do not
    carry over to it: find thresholds on its own logits with [`~hf_scan.calibrate`].

    Args:
        model ([`ScanForImageClassification`]): The network. It is exported in float32, in evaluation mode.
        folder (`str` or `Path`): Replaced as a whole after the comparison with PyTorch. An existing folder must be
            empty or an earlier export.
        calibration_dataset (*optional*): Rows with `pixel_values` as the network takes them, or a tensor of images: a
            few hundred real images, from which the ranges of activations are taken. Without it, `int8` is not made.
        include_preprocessing (`bool`, *optional*, defaults to `False`): Whether the graphs take uint8 images of shape
            `(batch_size, height, width, channels)` and normalise them.
        opset (`int`, *optional*, defaults to 20): The version of ONNX's operators.

    Raises:
        `ImportError`: if the packages of the extra `hf_scan[onnx]` are not installed.
        `ValueError`: if the network cannot be exported, or what was exported differs from PyTorch; if the folder holds
            something else.
        `OSError`: if the folder cannot be written, as when the disk is full. What was there has not changed then.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.runtime import ORTScanForImageClassification

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> model.export_onnx("exported")
    >>> engine = ORTScanForImageClassification.from_pretrained("exported")
    >>> images = torch.rand(2, 3, 32, 32)
    >>> torch.allclose(engine(images).logits, model(images).logits, atol=1e-4)
    True
    ```
    """
    require_extra("onnx", "The export")
    target = Path(folder)
    _check_folder(target)
    if include_preprocessing:
        _check_preprocessing(model)
    if model.config.truncated:
        raise ValueError("A truncated network has one exit and nothing to route; export it with `torch.onnx.export`.")
    compiled, model.compiled = model.compiled, None
    try:
        with staged_export(target, removed=lambda name: True) as new, evaluating(model):
            _write(model, new, calibration_dataset, include_preprocessing, opset)
    finally:
        model.compiled = compiled


def _check_folder(target: Path) -> None:
    finish(target)
    if target.exists() and (not target.is_dir() or (old_entries(target) and not (target / ONNX_FOLDER).is_dir())):
        raise ValueError(f"{target} exists and is not an earlier export. Name another folder, or remove it.")


def _check_preprocessing(model: "ScanForImageClassification") -> None:
    known = model.config.preprocessing or {}
    lengths = [len(known.get(name) or ()) for name in ("mean", "std")]
    if lengths != [model.config.num_channels] * 2:
        raise ValueError(
            f"`include_preprocessing=True` needs a mean and standard deviation for each of the "
            f"{model.config.num_channels} channels, and `model.config.preprocessing` is {known}. Set it, or export "
            "without."
        )


def _write(
    model: "ScanForImageClassification", folder: Path, calibration: Any, include_preprocessing: bool, opset: int | None
) -> None:
    from . import graphs

    size, channels = model.config.image_size, model.config.num_channels
    assert size is not None  # the network filled it in
    wrapped = _AllStages(model, model.config.preprocessing if include_preprocessing else None).eval()
    if include_preprocessing:
        image = {"dtype": "uint8", "shape": [size, size, channels]}
        pixels = torch.randint(0, 256, (max(BATCH_SIZES), size, size, channels), dtype=torch.uint8)
    else:
        image = {"dtype": "float32", "shape": [channels, size, size]}
        pixels = torch.randn(max(BATCH_SIZES), channels, size, size)
    pixels = pixels.to(model.device)
    states = _states_of(wrapped, pixels[:2])
    whole = _exported(wrapped, pixels[:2], states, opset or graphs.OPSET)
    manifest = Manifest(
        network=model.fingerprint(),
        precision="float32",
        num_labels=model.config.num_labels,
        image=image,
        states=states,
        counted={
            name: {"stages": costs.stages, "heads": costs.heads}
            for name, costs in (("macs", count_macs(model)), ("parameters", count_parameters(model)))
        },
    )
    write_graphs(whole, manifest, rule_of(model.exit_config, model.num_exits), folder / ONNX_FOLDER)
    _save_beside(model, folder)
    compare_with_pytorch(model, wrapped.images, folder, pixels)
    if calibration is not None:
        from .quantize import quantize

        quantized, own = quantize(whole, manifest, calibration)
        write_graphs(quantized, own, manifest.adaptive or {}, folder / INT8_FOLDER / ONNX_FOLDER)
        _save_beside(model, folder / INT8_FOLDER, int8=True)
        compare_with_itself(model.config.backbone, folder / INT8_FOLDER, pixels.cpu().numpy())


def _states_of(wrapped: _AllStages, pixels: torch.Tensor) -> list[list[dict[str, Any]]]:
    """Describe the state after each stage but the last, by running the network on two images."""
    model = wrapped.model
    states, state = [], StageState.from_images(wrapped.images(pixels))
    with torch.no_grad():
        for index, stage in enumerate(model.stages[:-1]):
            state = stage.run(model.backbone, state)
            own = [value for value, batched in zip(state.values, state.batched) if batched]
            values = [value for value in tree_leaves(own) if isinstance(value, torch.Tensor)]
            states.append(
                [
                    {
                        "name": f"state{index}_{position}",
                        "dtype": str(value.dtype).removeprefix("torch."),
                        "rows_per_image": len(value) // len(pixels),
                    }
                    for position, value in enumerate(values)
                ]
            )
    return states


def _exported(
    wrapped: _AllStages, pixels: torch.Tensor, states: list[list[dict[str, Any]]], opset: int
) -> "onnx.ModelProto":
    from . import graphs

    names = []
    for index, values in enumerate([*states, []]):
        names += [f"logits_{index}", *(value["name"] for value in values)]
    try:
        program = torch.onnx.export(
            wrapped,
            (pixels,),
            input_names=["pixel_values"],
            output_names=names,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    except Exception as error:  # the exporter raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{wrapped.model.config.backbone!r} cannot be exported to ONNX: {reason} Choose another backbone, or "
            "other `exit_points`."
        ) from error
    assert program is not None
    whole = graphs.infer_shapes(program.model_proto)
    graphs.fix_resize_scales(whole)
    return whole


def rule_of(exit_config: Any, num_exits: int) -> dict[str, Any]:
    """Return the rule that `adaptive.onnx` holds. Thresholds are an input of the graph and not part of it."""
    settings = ExitSettings.of(exit_config) if not callable(exit_config.criterion) else ExitSettings()
    if settings.thresholds is None:
        settings = settings.replace(thresholds=[0.5] * num_exits)
    rule = {name: getattr(settings, name) for name in RULE if name != "thresholds"}
    return {**rule, "heads": [step.runs for step in plan_steps(settings, num_exits)]}


def write_graphs(whole: "onnx.ModelProto", manifest: Manifest, rule: dict[str, Any], folder: Path) -> None:
    """
    Cut a whole network into the files of an export, and write them.

    Args:
        whole (`onnx.ModelProto`): The network, with every exit's logits and every state as outputs.
        manifest ([`Manifest`]): Describes the states. The files and the rule are added to it.
        rule (`dict`): The rule of `adaptive.onnx`.
        folder (`Path`): The folder to create.
    """
    from . import graphs

    folder.mkdir(parents=True)
    models: dict[str, Any] = {}
    inputs, rows = [graphs.IMAGE], None
    last = manifest.num_exits - 1
    for index in range(manifest.num_exits):
        values = manifest.states[index] if index < last else []
        handed_on = [value["name"] for value in values]
        models[f"stage_{index}.onnx"] = graphs.cut(whole, inputs, [f"logits_{index}", *handed_on], rows)
        if index < last:
            models[f"stage_{index}_without_head.onnx"] = graphs.cut(whole, inputs, handed_on, rows)
        inputs = handed_on
        rows = next((value["name"] for value in values if value["rows_per_image"] == 1), None)
    maps = graphs.convolved(whole, (value["name"] for state in manifest.states for value in state))
    for stage in models.values():
        if manifest.precision == "float32":
            graphs.enter_blocked_layout_once(stage)
        else:
            graphs.hand_on_channels_last(stage, maps)
    models["plain.onnx"] = graphs.cut(whole, [graphs.IMAGE], [f"logits_{last}"])
    manifest.adaptive = rule
    models["adaptive.onnx"] = nested(models, manifest)
    graphs.save_sharing_weights(models, folder)
    manifest.save(folder)


def nested(models: dict[str, Any], manifest: Manifest) -> Any:
    """Return `adaptive.onnx` for the manifest's rule, from the graphs of its stages."""
    from . import graphs

    assert manifest.adaptive is not None
    names = [
        f"stage_{index}.onnx" if runs else f"stage_{index}_without_head.onnx"
        for index, runs in enumerate(manifest.adaptive["heads"])
    ]
    states = [[value["name"] for value in values] for values in manifest.states]
    return graphs.nest([models[name] for name in names], states, manifest.adaptive)


def _save_beside(model: "ScanForImageClassification", folder: Path, int8: bool = False) -> None:
    """Save configuration, exit configuration, image processor and card, without the PyTorch weights."""
    from ..model.exit_config import ExitConfig
    from ..model.image_processing_scan import create_image_processor

    model.config.save_pretrained(folder)
    if model.config.num_channels == 3:
        create_image_processor(model).save_pretrained(folder)
    config = model.exit_config
    if int8 or callable(config.criterion):
        kept = {"fallback": config.fallback, "temperatures": config.temperatures, "trained_on": config.trained_on}
        criterion = "confidence" if callable(config.criterion) else config.criterion
        config = ExitConfig(criterion=criterion, **kept)  # type: ignore[arg-type]
    if config != ExitConfig():
        config.save_pretrained(folder)
    if not int8:
        from huggingface_hub import ModelCard, ModelCardData

        tags = [*model.model_tags, "onnx"]
        data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=tags)
        ModelCard.from_template(data).save(folder / "README.md")


__all__ = ["INT8_FOLDER", "export_onnx", "nested", "rule_of", "write_graphs"]
