import shutil
from collections import namedtuple

import pytest
import torch

from hf_scan.training.stage_features import StageFeatures, extract_stage_features

from ..conftest import random_scan_model


def rows(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 5} for i in range(count)]


def test_they_are_what_the_stages_return(tmp_path):
    model = random_scan_model().train()
    features = extract_stage_features(model, rows(7), tmp_path / "features", batch_size=3)
    assert model.training  # as it was
    expected = model.eval().extract_features(torch.stack([row["pixel_values"] for row in rows(7)]))
    again = StageFeatures(tmp_path / "features")
    assert len(again) == 7
    for index in range(7):
        row = again[index]
        assert row["labels"] == features[index]["labels"] == index % 5
        for stage, feature in enumerate(row["stage_features"]):
            torch.testing.assert_close(feature, expected[stage][index], rtol=1e-3, atol=1e-4)


def test_nothing_half_written_stays_behind(tmp_path):
    model, bad = random_scan_model(), rows(7)
    bad[5]["pixel_values"] = torch.randn(4, 16, 16)
    with pytest.raises(Exception, match=r"stack|shape|size"):
        extract_stage_features(model, bad, tmp_path / "features", batch_size=3)
    assert not (tmp_path / "features").exists()


def test_a_disk_without_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(OSError, match=r"The features of 7 images take 0\.0 GB, and .* has 0\.0 GB left"):
        extract_stage_features(random_scan_model(), rows(7), tmp_path / "features")
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("name", ["stage_00.npy", "labels.npy"])
def test_a_damaged_file_is_named(tmp_path, name):
    extract_stage_features(random_scan_model(), rows(2), tmp_path / "features")
    file = tmp_path / "features" / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(OSError, match=rf"The features .*{name} cannot be read \(.+\)\. Remove .*features, and write"):
        StageFeatures(tmp_path / "features")


def test_folders_that_do_not_fit(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        extract_stage_features(random_scan_model(), rows(2), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no features of a split"):
        StageFeatures(tmp_path)
    with pytest.raises(ValueError, match="The dataset is empty"):
        extract_stage_features(random_scan_model(), [], tmp_path / "features")
