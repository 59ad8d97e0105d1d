"""Classify a folder of images, or parquet files with a column of images, on a laptop or a cluster of Ray.

    python examples/ray_batch.py --model runs/photos --input photos --output answers --actors 4

The answers are parquet files with the columns id, label, exit_index and confidence. A run that was interrupted goes on
where it was when it is started again. Needs `pip install 'hf_scan[ray]'`. With `RAY_ADDRESS` set it runs on that
cluster, whose machines have to reach the model and both folders by the same names.
"""

import argparse
from pathlib import Path
from typing import Any

import ray
from ray.data import SaveMode

from hf_scan.ray import ScanPredictor, skip_written


# Rows that an actor is given at a time. Ray reads a small file as one block, which one actor would answer alone.
ROWS_EACH = 1024


def read(folder: str, image_column: str, id_column: str) -> tuple[Any, str, str]:
    """Return the images, and the names of the columns of images and ids."""
    if any(Path(folder).glob("*.parquet")):
        rows = ray.data.read_parquet(folder, columns=[id_column, image_column])
        return rows.repartition(target_num_rows_per_block=ROWS_EACH), image_column, id_column
    endings = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"]
    return ray.data.read_binary_files(folder, include_paths=True, file_extensions=endings), "bytes", "path"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained network, or the folder of an export")
    parser.add_argument("--input", required=True, help="a folder of images in any depth, or of parquet files")
    parser.add_argument("--output", required=True, help="folder for the answers")
    parser.add_argument("--image-column", default="image", help="of parquet files (default: image)")
    parser.add_argument("--id-column", default="id", help="of parquet files (default: id)")
    parser.add_argument("--actors", type=int, default=2, help="processes that classify (default: 2)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs and threads of each (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="images with which a stage runs (default: 64)")
    parser.add_argument("--on-error", default="skip", choices=("skip", "raise"), help="about what is no image")
    given = parser.parse_args()
    if not ray.is_initialized():
        # Reading and writing need CPUs too; on a small machine they share those of the actors.
        ray.init(num_cpus=given.actors * given.cpus + 2)
    images, image_column, id_column = read(given.input, given.image_column, given.id_column)
    answers = skip_written(images, given.output, id_column).map_batches(
        ScanPredictor,
        fn_constructor_kwargs={
            "model": given.model,
            "image_column": image_column,
            "id_column": id_column,
            "batch_size": given.batch_size,
            "threads": given.cpus,
            "on_error": given.on_error,
        },
        compute=ray.data.ActorPoolStrategy(size=given.actors),
        num_cpus=given.cpus,
        batch_size=None,
    )
    answers.write_parquet(given.output, mode=SaveMode.APPEND)
    print(f"Written to {given.output}")


if __name__ == "__main__":
    main()
