import copy
import pickle
import shutil

import pytest
import torch

from hf_scan.model.compiled_stages import CompiledStages

from ..conftest import random_scan_model


def plain_logits(model, images):
    return model.predict_adaptive(images, thresholds=[0.6, 0.6, 0.6]).logits


def test_compiled_stages_take_batches_of_any_size(images):
    """Compiled for the first size and a few ranges, as PyTorch divides them, not for each that remains of a batch."""
    model, expected = random_scan_model(), random_scan_model()
    model.compile_stages(backend="eager", fullgraph=True)
    alike = random_scan_model()
    alike.compiled = CompiledStages([], alike.exit_heads, None)  # heads folded, and nothing compiled
    alike.compiled.stages = [stage.forward for stage in alike.stages]
    policy = {"thresholds": [0.6, 0.6, 0.6]}
    for size in (24, 20, 8, 1):
        model.predict_adaptive(images[:size].clone(), thresholds=[1.0, 1.0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (24, 19, 11, 5, 1):
            found, plain = (network.predict_adaptive(images[:size].clone(), **policy) for network in (model, alike))
            assert torch.equal(found.exit_index, plain.exit_index)
            torch.testing.assert_close(found.logits, plain.logits)
            plain = expected.predict_adaptive(images[:size].clone(), **policy)
            assert torch.equal(found.exit_index, plain.exit_index)
            torch.testing.assert_close(found.logits, plain.logits, rtol=1e-3, atol=1e-4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.predict_adaptive(images, **policy).logits, plain_logits(expected, images))


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler for CPUs needs a C++ compiler")
@pytest.mark.parametrize("freezing", [False, True])
def test_stages_are_really_compiled(images, freezing):
    """By PyTorch's own compiler, with weights laid out beforehand and without."""
    model, expected = (random_scan_model(exit_points=["layer1"]) for _ in range(2))
    model.compile_stages()
    policy = {"thresholds": [0.6, 0.6]}
    with torch._inductor.config.patch(freezing=freezing):
        for size in (24, 1):
            found, plain = (network.predict_adaptive(images[:size], **policy) for network in (model, expected))
            assert torch.equal(found.exit_index, plain.exit_index)
            torch.testing.assert_close(found.logits, plain.logits, rtol=1e-3, atol=1e-4)


def test_what_is_compiled_does_not_outlive_its_weights(images):
    policy = {"thresholds": [0.2, 0.2, 0.2]}
    model, expected = random_scan_model(), random_scan_model()
    model.compile_stages(backend="eager")
    for network in (model, expected):
        network.train().exit_heads[0].classifier.fc.bias.data.add_(1.0)
    found, plain = (network.eval().predict_adaptive(images, **policy) for network in (model, expected))
    assert torch.equal(found.logits, plain.logits)
    assert (found.exit_index == 0).any()


def test_what_is_compiled_moves_along(images):
    policy = {"thresholds": [0.2, 0.2, 0.2]}
    model, expected = random_scan_model(), random_scan_model()
    model.compile_stages(backend="eager")
    found, plain = (network.double().predict_adaptive(images.double(), **policy) for network in (model, expected))
    assert found.logits.dtype == torch.float64
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-5)
