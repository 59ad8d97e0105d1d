"""Run by `test_adaptive_stream.py` in two processes: what each answers of a dataset that they share."""

import sys

import torch
from accelerate import PartialState
from datasets import Dataset

from ..conftest import random_scan_model


def noise_rows(count: int) -> Dataset:
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return Dataset.from_dict({"pixel_values": pixels.numpy()}).with_format("torch")


def main(output_dir: str) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    answers = list(
        random_scan_model().predict_adaptive_stream(noise_rows(21), batch_size=4, thresholds=[0.6, 0.6, 0.6])
    )
    columns = {name: torch.cat([answer[name] for answer in answers]) for name in list(answers[0])}
    torch.save(columns, f"{output_dir}/{state.process_index}.pt")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
