# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Which images weights were trained on, as the text of [`ExitConfig`]'s `trained_on`, one part for each training."""

SEPARATOR = "; "
UNKNOWN = "unknown: "


def join_trained_on(before: str | None, now: str | None) -> str | None:
    """
    Add what weights are trained on now to what they were trained on before.

    Args:
        before, now (`str`, *optional*): Parts, each the digests of a split or [`unknown_images`].

    Returns:
        `str`, *optional*: all parts, each once, the last training's last.

    Example:

    ```python
    >>> from hf_scan.model.provenance import join_trained_on

    >>> join_trained_on("2: aa bb; 1: cc", "2: aa bb")
    '1: cc; 2: aa bb'
    ```
    """
    last = _parts(now)
    return SEPARATOR.join([*(part for part in _parts(before) if part not in last), *last]) or None


def unknown_images(what: str) -> str:
    """
    Return a part that says that weights were trained on images which cannot be known.

    Args:
        what (`str`): What the images are known by, such as `"weights of resnet50.a1_in1k"`.
    """
    return UNKNOWN + " ".join(what.replace(SEPARATOR.strip(), ",").split())


def known_parts(trained_on: str | None) -> list[str]:
    """Return the parts that hold digests of images."""
    return [part for part in _parts(trained_on) if not part.startswith(UNKNOWN)]


def unknown_parts(trained_on: str | None) -> list[str]:
    """Return what is said of the images that cannot be known."""
    return [part.removeprefix(UNKNOWN) for part in _parts(trained_on) if part.startswith(UNKNOWN)]


def _parts(text: str | None) -> list[str]:
    return [part for part in (text or "").split(SEPARATOR) if part]


__all__ = ["join_trained_on", "known_parts", "unknown_images", "unknown_parts"]
