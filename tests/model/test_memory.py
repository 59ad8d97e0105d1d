"""Batches that memory does not suffice for."""

import os
import subprocess
import sys

import pytest
import torch

from hf_scan.model.memory import within_memory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes memory away with Linux' resource limits")
def test_a_batch_that_memory_does_not_suffice_for():
    """The size that the error names is tried in that process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.batch_of_a_small_machine"],
        capture_output=True,
        text=True,
        timeout=120,
        # glibc returns large blocks to the system then, so that holes in its heap leave no less room the second time.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("Memory does not suffice for a batch of")]
    assert len(lines) == 2
    assert all("use batches of at most that size. (" in line for line in lines)


@pytest.mark.parametrize(
    ("room", "found", "sizes"),
    [(5, "4 fit", [16, 8, 4]), (1, "1 fit", [16, 8, 4, 2, 1]), (0, "not even one fits", [16, 8, 4, 2, 1])],
)
def test_the_size_that_fits_is_found_by_halving(room, found, sizes):
    tried = []

    def run(size):
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("no room")
        return size

    with pytest.raises(torch.OutOfMemoryError, match=rf"batch of 16: {found}.*\(no room\)"):
        within_memory(run, 16)
    assert tried == sizes


def test_other_errors_are_not_tried_again():
    tried = []

    def run(size):
        tried.append(size)
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied$"):
        within_memory(run, 16)
    assert tried == [16]
