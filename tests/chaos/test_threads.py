"""Eight threads that share a network, each with thresholds of its own, for a minute."""

import threading
import time
from pathlib import Path

import pytest
import torch

from hf_scan.runtime import ORTScanForImageClassification

from ..conftest import random_scan_model
from .processes import RANDOM, SEED


THREADS = 8
SECONDS = 60
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", ["PyTorch", "compiled stages", "ONNX Runtime"])
def test_threads_do_not_mix_thresholds(tmp_path: Path, kind: str):
    network = random_scan_model()
    images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rules = [[RANDOM.uniform(0.2, 0.9), RANDOM.choice([None, RANDOM.uniform(0.2, 0.9)])] for _ in range(THREADS)]
    expected = [network.predict_adaptive(images, thresholds=rule) for rule in rules]
    assert len({tuple(answer.exit_index.tolist()) for answer in expected}) > 1
    if kind == "compiled stages":
        network.compile_stages(backend="eager")
    if kind == "ONNX Runtime":
        network.export_onnx(tmp_path / "exported")
        network = ORTScanForImageClassification.from_pretrained(tmp_path / "exported")
    end = time.monotonic() + (SECONDS if kind == "PyTorch" else SECONDS / 4)
    counts, failures = [0] * THREADS, []

    def answer(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        try:
            while time.monotonic() < end and not failures:
                size = int(torch.randint(1, 17, (), generator=generator))
                chosen = torch.randperm(len(images), generator=generator)[:size]
                found = network.predict_adaptive(images[chosen], thresholds=rules[number])
                assert torch.equal(found.exit_index, expected[number].exit_index[chosen])
                torch.testing.assert_close(found.logits, expected[number].logits[chosen], rtol=1e-3, atol=1e-3)
                counts[number] += 1
        except BaseException as error:
            failures.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"\n{THREADS} threads on {kind}, seed {SEED}: {sum(counts)} batches, {len(failures)} failures.")
    assert not failures, failures
    assert min(counts) > 0
