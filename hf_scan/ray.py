# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Classify datasets of Ray on one machine or many: [`ScanPredictor`] and [`skip_written`]."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .serving.images import MAX_PIXELS, ImageReader
from .serving.loading import load_model


UNREADABLE = -1  # the exit of an image that is no image


class ScanPredictor:
    """
    A callable class for `ray.data.Dataset.map_batches`: each actor of it loads the network once, and classifies blocks
    of images by [`~AdaptiveStreamMixin.predict_adaptive_stream`], so that every stage runs full batches.

    Ray keeps no order: rows are told apart by `id_column`. A block that an actor did not finish, because it died, is
    given to another one, which answers the same.

    Args:
        model (`str`): The folder or repository of a trained network, or the folder of an export, as every machine of
            the cluster reaches it.
        image_column (`str`, *optional*, defaults to `"bytes"`):
            The column of images: files as `bytes`, alone or in a dictionary as `datasets` writes them, or pixels of
            uint8 of shape `(height, width, channels)` as `ray.data.read_images` reads them.
        id_column (`str`, *optional*, defaults to `"path"`): The column that says which image it is.
        batch_size (`int`, *optional*, defaults to 64): Images with which a stage is run.
        threads (`int`, *optional*, defaults to 1): Threads that an actor computes with: its `num_cpus`.
        max_pixels (`int`, *optional*, defaults to 50,000,000): The most pixels of an image.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do about what is no image. `"skip"` gives it an empty label, the exit -1 and NaN as confidence.
        kwargs: Arguments of `predict_adaptive_stream`, such as `thresholds=[0.9, 0.9]`.

    Raises:
        `OSError`: if there is no such network, or it has no image processor.
        `ValueError`: if `on_error` is unknown, a column is missing, or, unless it is skipped, something is no image.

    Example:

    ```python
    import ray
    from hf_scan.ray import ScanPredictor

    images = ray.data.read_binary_files("photos", include_paths=True)
    answers = images.map_batches(
        ScanPredictor,
        fn_constructor_kwargs={"model": "runs/photos"},
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
        batch_size=None,
    )
    answers.write_parquet("answers")  # id, label, exit_index, confidence
    ```
    """

    def __init__(
        self,
        model: str,
        image_column: str = "bytes",
        id_column: str = "path",
        batch_size: int = 64,
        threads: int = 1,
        max_pixels: int = MAX_PIXELS,
        on_error: Literal["raise", "skip"] = "raise",
        **kwargs: Any,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` is {on_error!r}; expected 'raise' or 'skip'.")
        loaded = load_model(model, threads)
        self.model, self.read = loaded.model, ImageReader(loaded.processor, loaded.model, max_pixels)
        self.image_column, self.id_column, self.batch_size = image_column, id_column, batch_size
        self.on_error, self.settings = on_error, kwargs

    def __call__(self, block: Mapping[str, Any]) -> Iterator[dict[str, np.ndarray]]:
        """
        Classify a block.

        Args:
            block (`Mapping[str, np.ndarray]`): Columns of the same length.

        Yields:
            `dict[str, np.ndarray]`: the columns `id`, `label`, `exit_index` and `confidence` of some images; of all
            batches together, each image once.
        """
        for name in (self.image_column, self.id_column):
            if name not in block:
                raise ValueError(
                    f"The dataset has the columns {sorted(block)}, and no {name!r}. Name those of images and ids by "
                    "`image_column` and `id_column`."
                )
        ids, readable, unreadable = np.asarray(block[self.id_column]), [], []

        def batches() -> Iterator[Any]:
            for start in range(0, len(ids), self.batch_size):
                pixels = []
                for row in range(start, min(start + self.batch_size, len(ids))):
                    try:
                        pixels.append(self._pixels(block[self.image_column][row]))
                        readable.append(row)
                    except ValueError as error:
                        if self.on_error == "raise":
                            raise ValueError(f"The image {str(ids[row])!r} cannot be read: {error}") from error
                        unreadable.append(row)
                if pixels:
                    yield _stacked(pixels)

        for answer in self.model.predict_adaptive_stream(batches(), batch_size=self.batch_size, **self.settings):
            rows = [readable[position] for position in answer.ids.tolist()]
            labels = [self.model.config.id2label[index] for index in answer.logits.argmax(-1).tolist()]
            yield _columns(ids[rows], labels, answer.exit_index, answer.confidence)
        if unreadable:
            count = len(unreadable)
            yield _columns(ids[unreadable], [""] * count, [UNREADABLE] * count, [np.nan] * count)

    def _pixels(self, image: Any) -> Any:
        if isinstance(image, Mapping):
            image = image.get("bytes")
        if isinstance(image, (bytes, bytearray, memoryview)):
            return self.read(bytes(image))
        if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.dtype == np.uint8:
            from PIL import Image

            return self.read.prepare(Image.fromarray(image))
        raise ValueError(
            f"it is a {type(image).__name__}; expected the bytes of a file, or pixels of uint8 of shape (height, "
            "width, channels)."
        )


def skip_written(dataset: Any, output: str | Path, id_column: str = "path") -> Any:
    """
    Return a dataset without the rows that an earlier run has answered, to resume it. Files that the run was writing
    when it ended are renamed to `*.damaged`, and their rows are kept.

    Args:
        dataset (`ray.data.Dataset`): The images.
        output (`str` or `Path`): The folder of parquet files to which the run wrote. The ids in it have to fit into
            memory.
        id_column (`str`, *optional*, defaults to `"path"`): The column of the dataset that says which image it is.
    """
    written = written_ids(output)
    if not written:
        return dataset
    import ray

    there = ray.put(written)

    def others(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        known = ray.get(there)
        keep = np.array([value not in known for value in np.asarray(block[id_column]).tolist()], dtype=bool)
        return {name: values[keep] for name, values in block.items()}

    return dataset.map_batches(others, batch_size=None, zero_copy_batch=True)


def written_ids(output: str | Path) -> frozenset[Any]:
    """
    Return the ids in a folder of answers. Damaged files are renamed to `*.damaged`.

    Args:
        output (`str` or `Path`): A folder of parquet files with a column `id`, which may not exist yet.
    """
    import pyarrow
    from pyarrow import parquet

    found: set[Any] = set()
    for path in sorted(Path(output).glob("*.parquet")):
        try:
            found.update(parquet.read_table(path, columns=["id"]).column("id").to_pylist())
        except (pyarrow.ArrowInvalid, OSError):
            path.rename(path.with_suffix(".parquet.damaged"))
    return frozenset(found)


def _stacked(pixels: list[Any]) -> Any:
    if isinstance(pixels[0], np.ndarray):
        return np.stack(pixels)
    import torch

    return torch.stack(pixels)


def _columns(ids: Any, labels: list[str], exit_index: Any, confidence: Any) -> dict[str, np.ndarray]:
    return {
        "id": np.asarray(ids),
        "label": np.array(labels, dtype=object),
        "exit_index": np.asarray(exit_index, dtype=np.int64),
        "confidence": np.asarray(confidence, dtype=np.float32),
    }


__all__ = ["ScanPredictor", "skip_written", "written_ids"]
