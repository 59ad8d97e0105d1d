import numpy as np
from datasets import Dataset, Image

from hf_scan.data import sample_digests, shared_with, some_digests


def test_an_image_is_known_by_its_bytes_whatever_the_columns():
    pixels = [np.full((4, 4, 3), value, dtype=np.uint8) for value in range(6)]
    images = Dataset.from_dict({"img": pixels, "fine_label": list(range(6))}).cast_column("img", Image())
    renamed = images.rename_columns({"img": "image", "fine_label": "labels"}).add_column("row", list(range(6)))
    assert np.array_equal(sample_digests(images), sample_digests(renamed))
    assert len(set(sample_digests(images).tolist())) == 6
    assert shared_with(sample_digests(renamed)[:3], some_digests(images)) == (3, 3.0)
    for odd in ("", ": ", "x: y", "0: 0"):  # what a stranger's file may hold
        assert shared_with(sample_digests(images), odd)[0] == 0
