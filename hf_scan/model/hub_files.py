# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find and download files of one commit, and verify their checksums."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import CONFIG_NAME, hub, logging


logger = logging.get_logger(__name__)

LARGEST_JSON = 2**26  # bytes; labels of a million classes take less


def check_file_name(filename: str) -> None:
    """Raise a `ValueError` for a name that leads out of the folder or the repository."""
    parts = Path(filename).parts
    if not parts or os.path.isabs(filename) or ".." in parts or "\\" in filename:
        raise ValueError(f"{filename!r} is not the name of a file in a folder or a repository, such as 'fast.json'.")


def _check_regular(path: Path) -> None:
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise OSError(
            f"{path} is no regular file but a folder, a pipe, a device or a dangling link, and is not read. Remove "
            "it, or save or download the model again."
        )
    if path.suffix == ".json" and path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise OSError(f"{path} has more than {LARGEST_JSON:,} bytes, and is not read. Save or download it again.")


def check_regular_files(folder: Path) -> None:
    """Raise an `OSError` if a file that a model is loaded from would block a reader, or fill memory."""
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.suffix in (".json", ".safetensors"):
            _check_regular(path)


def resolve_revision(
    name: str | os.PathLike[str],
    revision: str | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str | None:
    """
    Return the commit that a branch or a tag points at now, so that all files come from the same one. A revision that
    cannot be resolved is returned as it is, as is that of a folder, and any with versions of Transformers that do not
    resolve revisions.
    """
    resolve = getattr(hub, "resolve_revision", None)
    if resolve is None or os.path.isdir(name):
        return revision
    found: str | None = resolve(name, revision, token=token, local_files_only=local_files_only, cache_dir=cache_dir)
    return found


def find_file(
    name: str | os.PathLike[str],
    filename: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path | None:
    """
    Find a file in a folder, in the cache or on the Hub.

    Returns:
        `Path`, *optional*: `None` if there is no such file. Offline, a file that was never downloaded is taken to be
        missing, with a warning, if the model's configuration is cached.

    Raises:
        `ValueError`: if the name leads out of the folder or the repository.
        `OSError`: if the repository cannot be read, or, offline, holds no cached configuration.
    """
    check_file_name(filename)
    if os.path.isdir(name):
        path = Path(name, subfolder, filename)
        _check_regular(path)
        return path if path.is_file() else None
    place: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    options: dict[str, Any] = {"local_files_only": local_files_only, "force_download": force_download}
    whole = f"{subfolder}/{filename}" if subfolder else filename
    try:
        with checked_downloads(name, cache_dir):
            return Path(hf_hub_download(str(name), whole, token=token, **place, **options))
    except LocalEntryNotFoundError as error:
        beside = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        cached, neighbour = (try_to_load_from_cache(str(name), path, **place) for path in (whole, beside))
        if cached is not None:  # known not to exist
            return None
        if (local_files_only or is_offline_mode()) and isinstance(neighbour, str):
            logger.warning(f"{whole} of {name} is not in the cache, and taken to be missing on the Hub too.")
            return None
        reason: Exception = error
    except EntryNotFoundError:
        return None
    except Exception as error:  # of the client, whose kinds differ between its versions
        reason = error
    raise OSError(
        f"{whole} of {name} could not be loaded ({type(reason).__name__}: {reason}). Check the name, the token and "
        "the connection, and try again."
    ) from reason


@contextmanager
def checked_downloads(name: str | os.PathLike[str] | None, cache_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """
    Verify the checksums of the files that are downloaded meanwhile, which the client does not, and remove damaged ones
    from the cache, where files are named by their checksum on the Hub.

    Raises:
        `OSError`: if files are damaged.
    """
    if name is None:
        yield
        return
    started = time.time() - 2  # times of file systems are coarse
    try:
        yield
    except Exception:
        _remove_damaged(name, cache_dir, started)
        raise
    _remove_damaged(name, cache_dir, started)


def _remove_damaged(name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None, started: float) -> None:
    # Folders are not cached, and neither is anything else that is not the name of a repository.
    cached = Path(cache_dir or HF_HUB_CACHE, "--".join(["models", *str(name).split("/")]), "blobs")
    damaged = []
    for blob in cached.iterdir() if not os.path.isdir(name) and cached.is_dir() else ():
        with suppress(FileNotFoundError):  # another process removed it
            if blob.stat().st_mtime >= started and not _has_named_checksum(blob):
                blob.unlink()
                damaged.append(blob)
    if damaged:
        raise OSError(
            f"{len(damaged)} of the files of {name} came damaged from the Hub: their checksums differ from those "
            "there. They were removed from the cache; load the model again."
        )


def _has_named_checksum(blob: Path) -> bool:
    """Return whether a cached file has the checksum in its name: SHA-256, or git's or SHA-1 for small files."""
    algorithm = {64: "sha256", 40: "sha1"}.get(len(blob.name))
    if algorithm is None:
        return True
    digests = [hashlib.new(algorithm)]
    if algorithm == "sha1":
        digests.append(hashlib.sha1(b"blob %d\0" % blob.stat().st_size))
    with blob.open("rb") as file:
        while part := file.read(2**20):
            for digest in digests:
                digest.update(part)
    return blob.name in [digest.hexdigest() for digest in digests]
