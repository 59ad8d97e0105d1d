"""Exports of networks that give several labels an image."""

import numpy as np
import pytest
import torch

from hf_scan import ExitConfig, calibrate
from hf_scan.runtime import ExitSettings, ORTScanForImageClassification

from ..conftest import random_scan_model


@pytest.fixture(scope="module")
def several():
    return random_scan_model(problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def folder(several, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "exported"
    several.export_onnx(folder)
    return folder


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_stages_and_one_file_answer_as_pytorch_does(several, folder, images, fallback, tmp_path):
    engine = ORTScanForImageClassification.from_pretrained(folder)
    engine.exit_config = ExitSettings([0.54, None, 0.56], "label_confidence", [0.7, 1.5, 1.0], fallback)
    expected = several.predict_adaptive(images, exit_config=ExitConfig(**engine.exit_config.rule))
    assert len(expected.exit_index.unique()) > 1
    engine.save_pretrained(tmp_path)
    one_file = ORTScanForImageClassification.from_pretrained(tmp_path)
    one_file.run = None  # so that running a stage would fail
    singles = [one_file.predict_adaptive(image[None]) for image in images.numpy()]
    for found in ([engine.predict_adaptive(images.numpy())], singles):
        assert np.concatenate([answer.exit_index for answer in found]).tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(
            np.concatenate([answer.confidence for answer in found]), expected.confidence.numpy(), rtol=1e-4
        )


def test_a_criterion_that_compares_classes_is_refused(folder, images):
    engine = ORTScanForImageClassification.from_pretrained(folder)
    assert engine.exit_config.criterion == "label_confidence"
    with pytest.raises(ValueError, match="expected 'label_confidence'"):
        engine.exit_config = ExitConfig([0.5, 0.5])
    with pytest.raises(ValueError, match="expected 'label_confidence'"):
        engine.predict_adaptive(images.numpy(), exit_config=ExitSettings([0.5, 0.5]))


def test_thresholds_are_found_on_its_own_logits(folder):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(200, 3, 16, 16, generator=generator)
    engine = ORTScanForImageClassification.from_pretrained(folder)
    deepest = np.concatenate([engine.forward(batch.numpy()).logits for batch in pixels.split(50)])
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, (deepest > 0).astype(np.float32))]
    engine.exit_config = calibrate(engine, rows, max_accuracy_drop=40.0)
    assert engine.exit_config.search["baseline_accuracy"] == 1.0
    assert engine.exit_config.search["accuracy"] >= 0.6
