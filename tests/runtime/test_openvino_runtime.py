"""What OpenVINO does otherwise than ONNX Runtime: compiled sizes, requests of threads, devices."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hf_scan.runtime import ORTScanForImageClassification, OVScanForImageClassification


@pytest.fixture(scope="module")
def openvino(exported) -> OVScanForImageClassification:
    return OVScanForImageClassification.from_pretrained(exported)


@pytest.mark.parametrize("thresholds", [[0.5, 0.5], [None, None], [0.45, None, 0.6]])
def test_it_answers_as_onnx_runtime_does(openvino, exported, images, thresholds):
    other = ORTScanForImageClassification.from_pretrained(exported)
    for batch in (images[:1].numpy(), images[:5].numpy(), images.numpy()):
        found = openvino.predict_adaptive(batch, thresholds=thresholds)
        expected = other.predict_adaptive(batch, thresholds=thresholds)
        assert found.exit_index.tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=5e-5 * np.abs(found.logits).max())


def test_threads_that_share_an_engine_keep_their_answers(openvino, images):
    """The memory of one request, or of its last answer, is not another's."""
    pixels = images.numpy()
    expected = [openvino.plain(image[None]) for image in pixels]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda image: openvino.plain(image[None]), pixels))
            assert all((one == other).all() for one, other in zip(found, expected))


def test_a_device_that_is_not_there_is_refused(exported):
    with pytest.raises(ValueError, match="`device` is 'TPU', which OpenVINO does not find"):
        OVScanForImageClassification.from_pretrained(exported, device="TPU")
