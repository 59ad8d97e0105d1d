# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Translate errors of a full disk and of the Hub's client into a sentence, and write small files as a whole."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How the errors of libraries that write from other languages, and have no error number, say it.
FULL_WORDS = (*map(os.strerror, FULL), "PytorchStreamWriter failed")

LONGEST_REASON = 500  # characters


@contextmanager
def named_full_disk(path: str | os.PathLike[str], outcome: str, instead: str = "") -> Iterator[None]:
    """
    Name the path, the outcome and a remedy in the error of a full disk.

    Args:
        path (`str` or `Path`): The file or the folder that is written.
        outcome (`str`): What the error says of it.
        instead (`str`, *optional*, defaults to `""`): What else to do, at the end of a sentence in the imperative.

    Raises:
        `OSError`: if the disk is full, or a quota is used up. Other errors are left as they are.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{path} could not be written: the disk is full, and {outcome}. Make space there, or choose another "
            f"folder{instead}.",
        ) from error


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error, of any library, is that of a full disk or an exhausted quota."""
    return getattr(error, "errno", None) in FULL or any(words in str(error) for words in FULL_WORDS)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """
    Write a text file beside the old one and rename it, so that a reader sees the old or the new one.

    Raises:
        `OSError`: if it cannot be written. The old file has not changed then.
    """
    target = Path(path)
    with named_full_disk(target, "what was there has not changed"):
        unfinished = target.with_name(f".{target.name}-{os.getpid()}-{get_ident()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def named_push_errors(repo_id: str) -> Iterator[None]:
    """
    Translate errors of the Hub's client into a sentence, while something is pushed.

    Raises:
        `OSError`: if the Hub cannot be reached or refuses the push.
    """
    try:
        yield
    except Exception as error:  # of the client, whose kinds differ between its versions
        if _names_an_argument(error):
            raise
        raise OSError(
            f"{repo_id} could not be pushed to ({reason_of(error)}). Check the name, a token that may write there "
            "(`hf auth login`) and the connection, and push again."
        ) from error


@contextmanager
def named_download_errors(name: str) -> Iterator[None]:
    """
    Translate errors of the Hub's client into a sentence, while something is downloaded.

    Raises:
        `OSError`: if the Hub cannot be reached, or does not have it.
    """
    try:
        yield
    except Exception as error:
        if _names_an_argument(error):
            raise
        raise OSError(
            f"{name} could not be loaded ({reason_of(error)}). Check the name, the token and the connection, and try "
            "again."
        ) from error


def _names_an_argument(error: Exception) -> bool:
    """Return whether an error is of what the caller gave, rather than of an answer of the Hub."""
    answered = isinstance(error, (OSError, json.JSONDecodeError, UnicodeError)) or hasattr(error, "request")
    return isinstance(error, (ValueError, TypeError)) and not answered


def shown(value: object, longest: int = 100) -> str:
    """Return a value as it stands in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def reason_of(error: BaseException) -> str:
    """Return kind and message of an error, in one line."""
    message = " ".join(str(error).split())[:LONGEST_REASON].rstrip(". ")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


__all__ = [
    "disk_is_full",
    "named_download_errors",
    "named_full_disk",
    "named_push_errors",
    "reason_of",
    "shown",
    "write_whole",
]
