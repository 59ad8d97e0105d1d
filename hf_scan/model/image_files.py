# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Read image files, and bring images of any depth to values from 0 to 255, as everything after it takes them."""

import base64
import io
import os
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps


LONGEST_NAME = 200  # characters of a source in an error; an image in base64 has millions


def eight_bits(image: Any, do_rescale: bool = True) -> Any:
    """
    Bring an image to values from 0 to 255. PIL and the image processors of Transformers would clip one of 16 bits to
    white. Values are scaled where the type gives their range:

    - 16 bits without a sign (PIL's modes `"I;16..."`; uint16): 65535 becomes 255.
    - Floating-point numbers (PIL's mode `"F"`; float32 and so on) from 0 to 1: 1 becomes 255.
    - Truth values: 0 and 255.

    Whole numbers (PIL's mode `"I"`; int32 and so on) and floating-point numbers from 0 to 255 keep their values.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): One image, or a batch of them. Those of 8 bits, and
            other objects, are returned as they are.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether the image processor divides values by 255. If not,
            arrays and tensors are returned as they are.

    Raises:
        `ValueError`: if an image holds other values, whose range cannot be known.
    """
    if isinstance(image, Image.Image):
        if not image.mode.startswith(("I", "F")):
            return image
        pixels = _scaled(np.asarray(image), f"An image of mode {image.mode!r}")
        return Image.fromarray(pixels.round().astype(np.uint8))
    if not do_rescale:
        return image
    if isinstance(image, np.ndarray):
        return _scaled(image, f"An image of {image.dtype}")
    if isinstance(image, torch.Tensor) and image.dtype != torch.uint8:
        pixels = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        return torch.from_numpy(_scaled(pixels, f"An image of {image.dtype}")).to(image.device)
    return image


def _scaled(pixels: np.ndarray, what: str) -> np.ndarray:
    """Return pixels from 0 to 255: of uint8, or of the type they have where that is a floating-point one."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8 or kind not in "biuf" or pixels.size == 0:
        return pixels
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind == "u" and pixels.dtype.itemsize == 2:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255):  # also with NaN
        raise ValueError(
            f"{what} holds values from {low:g} to {high:g}; expected values from 0 to 255, or 16 bits without a sign. "
            "Scale it, and save it with 8 or 16 bits."
        )
    if kind == "f":
        return pixels * 255 if high <= 1 else pixels
    return pixels.astype(np.uint8)


def read_image(source: Any, timeout: float | None = None) -> Image.Image:
    """
    Read an image, upright as its EXIF orientation says, with 8 bits and three channels.

    Args:
        source (`str`, `Path` or `PIL.Image.Image`): A file, a URL, an image in base64, or an image that may not have
            been read yet.
        timeout (`float`, *optional*): Seconds to wait for a URL.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `OSError`: if the image cannot be read. It is named.
        `TypeError`: if `source` is of another type.
        `ValueError`: if its values have no known range, see [`eight_bits`].
    """
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise TypeError(
            f"An image is given as {type(source).__name__}; expected a file, a URL, an image in base64 or an image of "
            "PIL."
        )
    name = _name_of(source)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_file_of(source, timeout))
        image.load()
        upright = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # of PIL and the client, which have many kinds
        reason = " ".join(str(error).split())[:LONGEST_NAME] or type(error).__name__
        raise OSError(f"{name} cannot be read as an image ({reason}). Repair or replace it.") from error
    try:
        scaled: Image.Image = eight_bits(upright)
        return scaled.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def _name_of(source: Any) -> str:
    name = getattr(source, "filename", None) or "an image of PIL" if isinstance(source, Image.Image) else str(source)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _file_of(source: str | os.PathLike[str], timeout: float | None) -> Any:
    """Return what PIL opens: the path of a file, or the bytes of a URL or of an image in base64."""
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        # Of the standard library, as a checkpoint's code may only import what every installation has.
        with urlopen(text, timeout=timeout) as response:
            return io.BytesIO(response.read())
    if os.path.exists(text):
        return text
    encoded = text.split(",", 1)[1] if text.startswith("data:image/") and "," in text else text
    try:
        return io.BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
    except ValueError:
        raise FileNotFoundError(
            f"There is no file {_name_of(source)}; expected an image file, a URL that starts with http:// or "
            "https://, or an image in base64."
        ) from None


__all__ = ["eight_bits", "read_image"]
