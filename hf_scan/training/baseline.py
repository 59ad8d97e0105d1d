# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The plain backbone as a baseline: the same initial weights, without exits."""

from transformers import EvalPrediction, TimmWrapperConfig, TimmWrapperForImageClassification

from ..model.backbone import backbone_arguments
from ..model.modeling_scan import ScanForImageClassification


def plain_copy(model: ScanForImageClassification) -> TimmWrapperForImageClassification:
    """
    Return the same backbone without early exits, as a stock model for a stock `Trainer`. Its checkpoints name the
    preprocessing, as timm's do.

    Args:
        model ([`ScanForImageClassification`]): Its backbone's weights are copied.

    Returns:
        [`~transformers.TimmWrapperForImageClassification`]

    Raises:
        `ValueError`: if the backbone is not one of timm.
    """
    config = model.config
    if config.backbone_source != "timm":
        raise ValueError(
            f"The backbone is one of {config.backbone_source!r}; expected one of timm. Train the network that it was "
            "converted from."
        )
    assert config.image_size is not None  # the network filled it in
    size = [config.num_channels, config.image_size, config.image_size]
    # timm and its image processor read it from the checkpoint; the default is the preprocessing of timm's weights.
    prepared = dict(config.preprocessing or {})
    if len(prepared["mean"]) == config.num_channels:  # else timm would refuse the checkpoint
        prepared |= {"input_size": size, "test_input_size": size}
    plain = TimmWrapperForImageClassification(
        TimmWrapperConfig(
            architecture=config.backbone,
            id2label=config.id2label,
            label2id=config.label2id,
            problem_type=config.problem_type,
            model_args={**backbone_arguments(config), "pretrained_cfg_overlay": prepared},
            pretrained_cfg=prepared,
        )
    )
    plain.timm_model.load_state_dict(model.backbone.state_dict())
    return plain


def plain_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the `accuracy` of an evaluation, as a `compute_metrics` function."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
