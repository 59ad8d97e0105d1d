# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Read JSON that runs have written or that flags hold, and name what cannot be read."""

import json
from pathlib import Path
from typing import Any


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """
    Read a file that holds an object of JSON.

    Args:
        path (`str` or `Path`): The file.
        what (`str`): What it is of, for messages, such as `"the figures of a run"`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; expected {what}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); expected {what}. Write it again.") from error
    return parse_json(text, str(path), f"expected {what}. Write it again")


def parse_json(text: str, name: str, expected: str) -> dict[str, Any]:
    """
    Return an object of JSON.

    Args:
        text (`str`): The JSON.
        name (`str`): What holds it, for messages.
        expected (`str`): What was expected, and what to do.

    Raises:
        `ValueError`: if it is something else.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON ({error}); {expected}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds a {type(found).__name__} and no object of JSON; {expected}.")
    return found


__all__ = ["parse_json", "read_json"]
