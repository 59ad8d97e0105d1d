"""A thousand configurations that are changed at random: each loads or is refused with a sentence."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .processes import SEED


COUNT = int(os.environ.get("CHAOS_CONFIGURATIONS", 1000))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]


def test_mutated_configurations(tmp_path):
    lines, crashed = tmp_path / "results", []
    lines.touch()
    while True:
        results = [json.loads(line) for line in lines.read_text().splitlines()]
        number = max([*(result["number"] for result in results), *crashed], default=-1) + 1
        if number >= COUNT:
            break
        command = [sys.executable, "-m", "tests.chaos.mutations", str(SEED), str(number), str(COUNT), str(lines)]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:  # at the configuration after the last that was written
            there = [json.loads(line)["number"] for line in lines.read_text().splitlines()]
            crashed.append(max([*there, *crashed], default=-1) + 1)
            print(f"\nThe process ended at number {crashed[-1]}: {done.stderr.decode()[-500:]}")
            assert len(crashed) < 10
    counts = Counter(result["found"] for result in results)
    slowest = max(result["seconds"] for result in results)
    print(f"\n{COUNT} mutated configurations, seed {SEED}: {dict(counts)}, slowest {slowest} s, crashed {crashed}.")
    print(dict(Counter((result["kind"], result["found"]) for result in results)))
    bad = [result for result in results if result["found"] not in ("loaded", "refused")]
    for result in bad:
        print(json.dumps(result))
    assert not bad
    assert not crashed
