from pathlib import Path

import pytest
import torch

from hf_scan.runtime import ExportedScan, ORTScanForImageClassification, OVScanForImageClassification

from ..conftest import random_scan_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """An exported network, in float32 and in 8 bits. Tests only read it."""
    folder = tmp_path_factory.mktemp("runtime") / "exported"
    calibration = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    random_scan_model().export_onnx(folder, calibration_dataset=calibration)
    return folder


# Every test of an engine on both runtimes, of which `make test` runs the first. What both share is in one class;
# `test_openvino_runtime.py` tests what is not.
RUNTIMES = [
    pytest.param(ORTScanForImageClassification, id="onnxruntime"),
    pytest.param(OVScanForImageClassification, id="openvino", marks=pytest.mark.slow),
]


@pytest.fixture(params=RUNTIMES)
def engine(request, exported) -> ExportedScan:
    return request.param.from_pretrained(exported)


@pytest.fixture(params=RUNTIMES)
def int8(request, exported) -> ExportedScan:
    return request.param.from_pretrained(exported, subfolder="int8")
