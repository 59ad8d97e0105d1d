# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Create an image processor of Transformers from the preprocessing of a network."""

from transformers import ConvNextImageProcessor, PreTrainedModel


def create_image_processor(model: PreTrainedModel) -> ConvNextImageProcessor:
    """
    Return the preprocessing that the backbone was made for, as a stock image processor: saved beside the weights,
    `AutoImageProcessor` and `pipeline("image-classification")` find it. It is timm's own evaluation transform, but for
    one row and column of pixels where the margin around the centre crop is odd (0.95 of 224, say), and from 384
    pixels on, where this processor squeezes the whole image into the square instead of cropping it.

    Args:
        model ([`ScanForImageClassification`]): Its `config.preprocessing` gives crop, interpolation, mean and standard
            deviation; its `config.image_size` the size.

    Raises:
        `ValueError`: if the network does not take three channels, which this processor always makes.
    """
    if model.config.num_channels != 3:
        raise ValueError(
            f"The network takes {model.config.num_channels} channels; an image processor is only made for 3. Pass "
            "your own `processing_class`."
        )
    settings = model.config.preprocessing
    assert settings is not None  # the network filled it in
    resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
    return ConvNextImageProcessor(
        size={"shortest_edge": model.config.image_size},
        crop_pct=settings["crop_pct"],
        resample=resample.get(settings["interpolation"], 3),
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
        do_convert_rgb=True,
    )


__all__ = ["create_image_processor"]
