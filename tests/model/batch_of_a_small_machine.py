"""Run by `test_memory.py` in a process of its own, which takes away most of its own memory."""

import resource
from pathlib import Path

import torch

from ..conftest import random_scan_model


def main() -> None:
    torch.set_num_threads(1)
    model = random_scan_model(image_size=32)
    images = torch.zeros(2048, 3, 32, 32)  # 24 MiB; the first feature of all of them takes 128
    policy = {"thresholds": [1.0, 1.0]}
    model.predict_adaptive(images[:4], **policy)  # so that what is loaded later is there
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 300 * 2**20,) * 2)
    for call in (
        lambda: model.predict_adaptive(images, **policy),
        lambda: list(model.predict_adaptive_stream([images], batch_size=len(images), **policy)),
    ):
        try:
            call()
        except RuntimeError as error:
            print(error)
            size = int(str(error).split(": ")[1].split()[0])
            assert 0 < size < len(images)
            assert len(model.predict_adaptive(images[:size], **policy).logits) == size


if __name__ == "__main__":
    main()
