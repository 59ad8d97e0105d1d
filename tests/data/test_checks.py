import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from hf_scan.data import check_images


def test_unreadable_images_are_named(tmp_path):
    """A text, one that ends too early, one that is not there, and one whose values have no range; all in one error."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{index}.png" for index in range(7)]
    for file in files:
        PILImage.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
    rows = Dataset.from_dict({"image": [str(file) for file in files], "labels": [0] * 7})
    rows = rows.cast_column("image", Image())
    check_images(rows, "train")
    files[1].write_text("a text")
    files[3].write_bytes(files[3].read_bytes()[:-1500])
    files[4].unlink()
    PILImage.fromarray(np.full((8, 8), 1e6, dtype=np.float32)).save(tmp_path / "deep.tiff")
    (tmp_path / "deep.tiff").rename(files[6])
    reasons = {1: "cannot identify image file", 3: "", 4: "No such file", 6: "mode 'F'"}
    for num_proc in (None, 2):
        with pytest.raises(OSError, match=r"The 'train' split has 4 of 7 images that cannot be read: ") as error:
            check_images(rows, "train", num_proc)
        for index, reason in reasons.items():
            assert f"row {index} ({files[index]}): " in str(error.value)
            assert reason in str(error.value)


def test_images_without_a_path(tmp_path):
    rows = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 8}).cast_column("image", Image())
    with pytest.raises(OSError, match=r"8 of 8 .* row 0 \(in the dataset's own file\): .* row 4 .*; and 3 more"):
        check_images(rows, "train")
