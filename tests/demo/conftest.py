from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_scan import ExitConfig
from hf_scan.calibration import ExitTable
from hf_scan.costs import CostModel
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.reporting.saved_frontier import SavedFrontier

from ..conftest import random_scan_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A network with thresholds, a frontier found on noise, and six images, as the quickstart leaves them."""
    folder = tmp_path_factory.mktemp("demo") / "network"
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.55, 0.6], fallback="deepest")
    model.save_pretrained(folder)
    create_image_processor(model).save_pretrained(folder)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(300, 3, 16, 16, generator=generator)
    with torch.inference_mode():
        logits = torch.stack(model(pixels).exit_logits, dim=1)
    # The deeper an exit, the more often it is right.
    labels = torch.where(torch.rand(300, generator=generator) < 0.97, logits[:, 2].argmax(-1), logits[:, 0].argmax(-1))
    table = ExitTable(logits.numpy(), labels.numpy(), torch.arange(300).numpy().astype("uint64"), "search", "demo")
    SavedFrontier.of(table, model.exit_config, CostModel.of(model)).save(folder)
    (folder / "samples").mkdir()
    for number in range(6):
        noise = (255 * torch.rand(16, 16, 3, generator=generator)).byte().numpy()
        Image.fromarray(noise).save(folder / "samples" / f"{number}.png")
    return folder
