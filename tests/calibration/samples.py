import numpy as np
import torch

from hf_scan import ExitConfig, apply_exit_rule
from hf_scan.calibration import (
    ExitTable,
)
from hf_scan.costs import ExitCosts, MeasuredCosts


def scores(n: int = 400, columns: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of varying difficulty; deeper columns are surer and right more often."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random((n, 1))
    confidences = np.clip(1 - difficulty * rng.random((n, columns)) * np.linspace(1, 0.4, columns), 0, 1)
    return confidences, rng.random((n, columns)) < confidences, np.linspace(0.4, 1.0, columns)


def dataset(n: int = 70, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 5} for i in range(n)]


COSTS = ExitCosts([0.3, 0.3, 0.3], [0.05, 0.05, 0.02])


ZERO = ExitCosts([0, 0, 0], [0, 0, 0])


def table(n: int = 1000, seed: int = 0, split: str = "search", model: str = "") -> ExitTable:
    """Three exits, the deeper the better, on samples of varying difficulty; five classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    logits = rng.normal(size=(n, 3, 5)) + rng.normal(size=(n, 1, 5))
    logits[np.arange(n)[:, None], np.arange(3), labels[:, None]] += np.linspace(3, 4.5, 3) - rng.normal(size=(n, 1))
    return ExitTable(logits.astype(np.float32), labels, rng.integers(0, 2**62, n).astype(np.uint64), split, model)


def measured(batch_size: int = 1) -> dict:
    """Times in which the second head costs far more than its stage saves."""
    one = ExitCosts(stages=[2.0, 2.0, 2.0], heads=[0.5, 3.0, 0.25])
    times = {1: one}
    if batch_size > 1:
        times[batch_size] = ExitCosts([2.0 * batch_size / 2] * 3, [0.5 * batch_size / 2, 1.0, 0.25])
    plain = {size: sum(costs.stages) + costs.heads[-1] for size, costs in times.items()}
    return MeasuredCosts(ZERO, ZERO, times, {}, plain, "float32", 1, "a machine").to_dict()


def accuracy_and_cost(table: ExitTable, config: ExitConfig, costs: ExitCosts) -> tuple[float, float]:
    """By the simulated rule, and what has run for each sample."""
    answer = apply_exit_rule(torch.from_numpy(table.logits).unbind(1), config)
    right = answer.logits.argmax(-1).numpy() == table.labels
    return right.mean(), np.array(costs.cumulative(config))[answer.exit_index.numpy()].mean()
