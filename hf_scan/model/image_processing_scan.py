# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Create an image processor of Transformers from the preprocessing of a network."""

from typing import Any

from transformers import BatchFeature, ConvNextImageProcessor, PreTrainedModel

from .image_files import eight_bits


class ScanImageProcessor(ConvNextImageProcessor):
    """
    A [`~transformers.ConvNextImageProcessor`] that scales or refuses images of more than 8 bits, as
    [`~hf_scan.model.image_files.eight_bits`] says, where Transformers clips them to white. It is saved under the name
    of the stock class: `AutoImageProcessor` loads that one, with or without `hf_scan`, and
    `ScanImageProcessor.from_pretrained` this one.
    """

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """
        Prepare images as [`~transformers.ConvNextImageProcessor`] does.

        Raises:
            `ValueError`: if an image holds values outside of 0 to 255 whose range cannot be known.
        """
        do_rescale = kwargs.get("do_rescale")
        rescaled = bool(self.do_rescale if do_rescale is None else do_rescale)
        return super().preprocess(_each(images, rescaled), *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, under the name of the stock class."""
        return {**super().to_dict(), "image_processor_type": ConvNextImageProcessor.__name__}


def _each(images: Any, do_rescale: bool) -> Any:
    if isinstance(images, (list, tuple)):
        return [_each(image, do_rescale) for image in images]
    return eight_bits(images, do_rescale)


def create_image_processor(model: PreTrainedModel) -> ScanImageProcessor:
    """
    Return the preprocessing that the backbone was made for. Saved beside the weights, it is a stock image processor,
    which `AutoImageProcessor` and `pipeline("image-classification")` find. It is timm's own evaluation transform, but
    for one row and column of pixels where the margin around the centre crop is odd (0.95 of 224, say), and from 384
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
    return ScanImageProcessor(
        size={"shortest_edge": model.config.image_size},
        crop_pct=settings["crop_pct"],
        resample=resample.get(settings["interpolation"], 3),
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
        do_convert_rgb=True,
    )


__all__ = ["ScanImageProcessor", "create_image_processor"]
