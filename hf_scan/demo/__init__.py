# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A page that shows where images leave a network: `hf-scan demo`."""

from typing import Any


def build_demo(model: str, **kwargs: Any) -> Any:
    """
    Return the page for a network, as [`hf_scan.demo.page.build_page`] does, which is imported here.

    Args:
        model (`str`): A folder or a repository on the Hub.
        kwargs: As [`~hf_scan.demo.page.build_page`] takes them.

    Raises:
        `ImportError`: if the extra `hf_scan[demo]` is not installed.
    """
    from .page import build_page

    return build_page(model, **kwargs)


__all__ = ["build_demo"]
