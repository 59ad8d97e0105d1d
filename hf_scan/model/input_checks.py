# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Check the images and labels that a network is given: [`InputChecksMixin`]."""

import math

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import check_image_size


logger = logging.get_logger(__name__)


class InputChecksMixin(PreTrainedModel):
    """A mixin that checks the inputs of a [`ScanForImageClassification`]."""

    def check_pixel_values(self, pixel_values: torch.Tensor, values: bool = False) -> None:
        """
        Raise a `ValueError` unless `pixel_values` is a batch of images that the network takes.

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
        check_image_size(self.backbone, *pixel_values.shape[2:])
        if values:
            # One pass, and one number to wait for. (Sums beyond float32 count as infinite too; no image has them.)
            total = pixel_values.sum(dtype=torch.float32).item()
            if not math.isfinite(total):
                raise ValueError(
                    "`pixel_values` holds NaN or infinite values; expected finite ones. Check the images."
                )
            self.warn_of_raw_pixels(total / pixel_values.numel())

    def prepare_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Return labels of shape `(batch_size,)` or `(batch_size, 1)`, of any type of whole numbers, as the loss takes
        them; with several labels an image, those of shape `(batch_size, num_labels)` and of any type.

        Args:
            labels (`torch.Tensor`): Class indices, of which -100 is ignored by the loss, as everywhere; or numbers
                from 0 to 1.

        Raises:
            `ValueError`: if they are of another shape or type, or, where looking costs no transfer, out of range.
        """
        check_values = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.config.problem_type == "multi_label_classification":
            return self._prepare_label_sets(labels, check_values)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            labels = labels.long()
        if labels.ndim != 1 or labels.dtype != torch.long:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)} and holds {labels.dtype}; expected (batch_size,) class "
                "indices of torch.int64. (For several labels an image, set `problem_type` to "
                "'multi_label_classification'.)"
            )
        if check_values and ((labels != -100) & ((labels < 0) | (labels >= self.num_labels))).any():
            raise ValueError(
                f"`labels` holds values from {int(labels.min())} to {int(labels.max())}; expected class indices from "
                f"0 to {self.num_labels - 1}. Set `num_labels` to what the data has, or correct the labels."
            )
        return labels

    def _prepare_label_sets(self, labels: torch.Tensor, check_values: bool) -> torch.Tensor:
        if labels.ndim != 2 or labels.shape[1] != self.num_labels or labels.is_complex():
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)} and holds {labels.dtype}; expected (batch_size, "
                f"{self.num_labels}) numbers from 0 to 1, as `problem_type` is 'multi_label_classification'."
            )
        labels = labels.float()
        if check_values and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError(
                f"`labels` holds values from {labels.min():g} to {labels.max():g}; expected 1 for each label that an "
                "image has and 0 for the others, or numbers between."
            )
        return labels

    def warn_of_raw_pixels(self, mean: float) -> None:
        """
        Warn once if pixels cannot have come from the image processor, as those from 0 to 255, or if they are all
        white, as of images of 16 bits that a stock image processor has clipped.

        Args:
            mean (`float`): Of all pixels of a batch.
        """
        settings = self.config.preprocessing
        assert settings is not None  # the network filled it in
        brightest = max((1 - offset) / scale for offset, scale in zip(settings["mean"], settings["std"]))
        if brightest > 0 and mean > 2 * brightest + 1:
            logger.warning_once(
                f"The pixels of a batch are brighter on average than {brightest:.2f}, the most that the model's image "
                "processor makes. Prepare images with it; pixels from 0 to 255 are not scaled by the network."
            )
        white = sum((1 - offset) / scale for offset, scale in zip(settings["mean"], settings["std"]))
        if abs(mean - white / len(settings["mean"])) < 1e-3:
            logger.warning_once(
                "The images of a batch are plain white. PIL and the image processors of Transformers clip images of "
                "more than 8 bits to white; `pipeline`, and `hf_scan.model.image_files.eight_bits` before the image "
                "processor, scale them."
            )


__all__ = ["InputChecksMixin"]
