# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Compare an export with PyTorch and with itself before it is put in place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .numpy_rule import RULE, ExitSettings, apply_exit_rule, plan_steps
from .onnx_runtime import ORTScanForImageClassification


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


BATCH_SIZES = (1, 2, 5)
# Tolerated difference as a share of the largest value. A wrong graph differs by far more, and the rounding of deep
# networks with random weights reaches a fifth of it.
TOLERANCE = 1e-3
# Cut 8-bit graphs are fused differently, and one rounding that falls to the other side moves a value by a 256th of
# its range.
INT8_TOLERANCE = 0.1


def compare_with_pytorch(
    model: "ScanForImageClassification",
    normalise: Callable[[torch.Tensor], torch.Tensor],
    folder: Path,
    pixels: torch.Tensor,
) -> None:
    """
    Open every session of an export and compare its logits with PyTorch, in batches of 1, 2 and 5.

    Args:
        model ([`ScanForImageClassification`]): The network that was exported.
        normalise (`Callable`): The preprocessing that is part of the graphs.
        folder (`Path`): The export.
        pixels (`torch.Tensor`): Five images as the graphs take them.

    Raises:
        `ValueError`: if a session cannot be opened, or differs.
    """
    with _failing_as_a_sentence(model.config.backbone):
        engine = _opened(folder)
        for size in BATCH_SIZES:
            with torch.no_grad():
                logits = [one.cpu().numpy() for one in model(normalise(pixels[:size])).exit_logits]
            images = pixels[:size].cpu().numpy()
            check_equal(f"the stages, {size} images", engine.forward(images).exit_logits, logits, TOLERANCE)
            check_equal(f"plain.onnx, {size} images", [engine.plain(images)], [logits[-1]], TOLERANCE)
            check_states_without_heads(engine, images, TOLERANCE)
            if size == 1:
                _compare_single(engine, images, logits, TOLERANCE)


def compare_with_itself(backbone: str, folder: Path, images: np.ndarray) -> None:
    """
    Open every session of a quantised export and compare the plain network, the stages and `adaptive.onnx` with one
    another, in batches of 1, 2 and 5: they are one network, which is not PyTorch's.

    Args:
        backbone (`str`): Its name, for the error.
        folder (`Path`): The export.
        images (`np.ndarray`): Five images as the graphs take them.

    Raises:
        `ValueError`: if a session cannot be opened, or they differ.
    """
    with _failing_as_a_sentence(backbone):
        engine = _opened(folder)
        for size in BATCH_SIZES:
            logits = engine.forward(images[:size]).exit_logits
            check_equal(f"int8/plain.onnx, {size} images", [engine.plain(images[:size])], logits[-1:], INT8_TOLERANCE)
            check_states_without_heads(engine, images[:size], INT8_TOLERANCE)
            if size == 1:
                _compare_single(engine, images[:1], logits, INT8_TOLERANCE)


def _opened(folder: Path) -> ORTScanForImageClassification:
    engine = ORTScanForImageClassification.from_pretrained(folder, provider="CPUExecutionProvider")
    engine.open_sessions()
    return engine


@contextmanager
def _failing_as_a_sentence(backbone: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # ONNX Runtime raises many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{backbone!r} cannot be exported to ONNX: ONNX Runtime does not run it ({reason}). Choose another "
            "backbone, or other `exit_points`."
        ) from error


def _compare_single(
    engine: ORTScanForImageClassification, images: np.ndarray, logits: Sequence[np.ndarray], tolerance: float
) -> None:
    """Compare `adaptive.onnx` with the rule on all logits, the image leaving at each exit in turn and at none."""
    rule = engine.manifest.adaptive
    assert rule is not None
    kept = {name: rule[name] for name in RULE if name != "thresholds"}
    for leave_at in range(engine.num_exits + 1):
        thresholds = [
            None if not runs else (0.0 if index == leave_at else 1.0) for index, runs in enumerate(rule["heads"])
        ]
        settings = ExitSettings(thresholds=thresholds, **kept)
        expected = apply_exit_rule(logits, settings)
        found = engine.run_nested(images, plan_steps(settings, engine.num_exits))
        check_equal(f"adaptive.onnx, left at {leave_at}", [found.logits], [expected.logits], tolerance)
        if tolerance == TOLERANCE and found.exit_index.tolist() != expected.exit_index.tolist():
            raise ValueError(
                f"adaptive.onnx leaves at exit {found.exit_index[0]}, and the rule on all logits at "
                f"{expected.exit_index[0]}. Nothing was written."
            )


def check_states_without_heads(engine: ORTScanForImageClassification, images: np.ndarray, tolerance: float) -> None:
    """Raise a `ValueError` unless each stage gives the same state with and without its head."""
    state: list[Any] = [images]
    for index in range(engine.num_exits - 1):
        alone, _ = engine.run(index, state, head=False)
        state, _ = engine.run(index, state, head=True)
        check_equal(f"stage_{index}_without_head.onnx", alone, state, tolerance)


def check_equal(what: str, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> None:
    """Raise a `ValueError` where arrays differ by more than a share of the largest value expected."""
    if len(found) != len(expected):
        raise ValueError(f"{what}: there are {len(found)} values, expected {len(expected)}. Nothing was written.")
    for index, (one, other) in enumerate(zip(found, expected)):
        one, other = one.astype(np.float64), other.astype(np.float64)
        difference = np.abs(one - other).max() / max(1.0, np.abs(other).max())
        if one.shape != other.shape or not difference <= tolerance:
            raise ValueError(
                f"What was exported differs from the network by {difference:.1e} of the largest value ({what}, value "
                f"{index}); expected at most {tolerance:g}. Nothing was written."
            )


__all__ = ["BATCH_SIZES", "compare_with_itself", "compare_with_pytorch"]
