# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The plain backbone that a network with exits is compared with: same initial weights, same recipe."""

from transformers import EvalPrediction, TimmWrapperConfig, TimmWrapperForImageClassification

from ..model.backbone import backbone_arguments
from ..model.modeling_scan import ScanForImageClassification


def plain_copy(model: ScanForImageClassification) -> TimmWrapperForImageClassification:
    """
    The same backbone without early exits, as a stock model for a stock `Trainer`.

    Args:
        model ([`ScanForImageClassification`]): Its backbone's weights are copied.

    Returns:
        [`~transformers.TimmWrapperForImageClassification`]
    """
    config = model.config
    plain = TimmWrapperForImageClassification(
        TimmWrapperConfig(
            architecture=config.backbone,
            id2label=config.id2label,
            label2id=config.label2id,
            model_args=backbone_arguments(config),
        )
    )
    plain.timm_model.load_state_dict(model.backbone.state_dict())
    return plain


def plain_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for it: the share of right answers, as `accuracy`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
