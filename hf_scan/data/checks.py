# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find images that cannot be read, before training meets them."""

from typing import Any

from ..extras import require_extra
from ..model.image_files import eight_bits


try:
    from datasets import Dataset, Features, Image, Value
except ImportError:
    require_extra("train", "`hf_scan.data.checks`")
    raise

FOUND = Features({"row": Value("int64"), "path": Value("string"), "error": Value("string")})
NAMED = 5  # images in an error


def check_images(dataset: Dataset, split: str, num_proc: int | None = None) -> None:
    """
    Decode every image of a split once, with a progress bar, and name those that cannot be read.

    Args:
        dataset (`datasets.Dataset`): With a column `image`, as [`prepare_columns`] makes it.
        split (`str`): What the split is called in an error.
        num_proc (`int`, *optional*): Processes that decode.

    Raises:
        `OSError`: if an image cannot be decoded, or is of a kind that training refuses. It names the split, the rows
            and the paths.
    """
    stored = dataset.cast_column("image", Image(decode=False))
    # Not from the cache: a file may have been repaired meanwhile.
    found = stored.map(
        _unreadable,
        with_indices=True,
        batched=True,
        remove_columns=stored.column_names,
        features=FOUND,
        keep_in_memory=True,
        load_from_cache_file=False,
        num_proc=num_proc,
        desc=f"checking the images of {split}",
    )
    if len(found) == 0:
        return
    first = found.select(range(min(NAMED, len(found))))
    named = "; ".join(f"row {row['row']} ({row['path']}): {row['error']}" for row in first)
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise OSError(
        f"The {split!r} split has {len(found)} of {len(dataset)} images that cannot be read: {named}{more}. Repair or "
        "remove them."
    )


def _unreadable(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in FOUND}
    decoder = Image()
    for row, value in zip(rows, batch["image"]):
        try:
            eight_bits(decoder.decode_example(value))
        except Exception as error:  # of PIL, which has many kinds
            path = value.get("path") if isinstance(value, dict) else None
            reason = " ".join(str(error).split()) or type(error).__name__
            for name, entry in (("row", row), ("path", path or "in the dataset's own file"), ("error", reason)):
                found[name].append(entry)
    return found


__all__ = ["check_images"]
