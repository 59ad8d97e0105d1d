# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Decode images of unknown origin, within limits, and prepare them for a network: [`ImageReader`]."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..data.transforms import eight_bits


# Those whose decoders are in wide use on images of strangers. (PIL's reader of EPS, say, starts another program.)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000


class ImageReader:
    """
    Makes what a network takes of the bytes of an image file, as its image processor does. The size is read from the
    file's head and checked before a pixel is decoded.

    Args:
        processor (`BaseImageProcessor`): The model's image processor.
        model ([`ScanForImageClassification`] or [`~hf_scan.runtime.ORTScanForImageClassification`]): The model.
        max_pixels (`int`, *optional*, defaults to 50,000,000): The most pixels of an image.

    Example:

    ```python
    >>> import io
    >>> from PIL import Image
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.model.image_processing_scan import create_image_processor
    >>> from hf_scan.serving.images import ImageReader

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10))
    >>> read, file = ImageReader(create_image_processor(model), model), io.BytesIO()
    >>> Image.new("RGB", (64, 48)).save(file, "PNG")
    >>> read(file.getvalue()).shape
    torch.Size([3, 32, 32])
    ```
    """

    def __init__(self, processor: Any, model: Any, max_pixels: int = MAX_PIXELS) -> None:
        if max_pixels < 1:
            raise ValueError(f"`max_pixels` is {max_pixels}; expected a whole number of at least 1.")
        self.processor, self.max_pixels = processor, max_pixels
        manifest = getattr(model, "manifest", None)
        self._exported = manifest is not None
        # Such graphs scale and normalise bytes by themselves.
        self._bytes = manifest is not None and manifest.image["dtype"] == "uint8"

    def __call__(self, content: bytes) -> Any:
        """
        Return the pixel values of an image file.

        Args:
            content (`bytes`): The file.

        Returns:
            `torch.Tensor`, or for an exported network `np.ndarray`, of shape `(num_channels, height, width)`; where
            the export prepares images itself, `(height, width, num_channels)` of bytes.

        Raises:
            `ValueError`: if it is no image of a common format, is damaged, or has too many pixels.
        """
        return self.prepare(self.decode(content))

    def decode(self, content: bytes) -> Image.Image:
        """Return the image of a file, turned as its camera was held."""
        if not content:
            raise ValueError(f"The image is empty; expected a file of one of {', '.join(FORMATS)}.")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            self._check_size(*image.size)
            image.load()
            return ImageOps.exif_transpose(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"The image has more pixels than the {self.max_pixels} that are accepted.") from error
        except UnidentifiedImageError as error:
            raise ValueError(
                f"The {len(content)} bytes are no image; expected a file of one of {', '.join(FORMATS)}."
            ) from error
        except (OSError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as error:  # whatever decoders raise
            raise ValueError(f"The image is damaged: {error}.".replace("..", ".")) from error

    def prepare(self, image: Image.Image) -> Any:
        """Return the pixel values of an image that is decoded."""
        image = eight_bits(image).convert("RGB")
        if self._bytes:
            settings = {"do_rescale": False, "do_normalize": False}
            pixels = np.asarray(self.processor([image], return_tensors="np", **settings)["pixel_values"][0])
            return pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        return self.processor([image], return_tensors="np" if self._exported else "pt")["pixel_values"][0]

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise ValueError(
                f"The image has {width} x {height} pixels, more than the {self.max_pixels} that are accepted. Scale "
                "it down."
            )


__all__ = ["FORMATS", "MAX_PIXELS", "ImageReader"]
