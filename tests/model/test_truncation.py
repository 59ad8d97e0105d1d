import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
)

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification


@pytest.mark.parametrize(
    "backbone", ["cifar_resnet20", "resnetblur18", "test_efficientnet", "test_vit", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("exit_index", [0, 1])
def test_a_truncated_network_answers_as_its_exit_does(backbone, exit_index, tmp_path):
    """To the bit, smaller on the disk, and like any other: saved, loaded, copied, trained."""
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=4)).eval()
    images = torch.randn(3, 3, model.config.image_size, model.config.image_size)
    small = model.truncate(exit=exit_index)
    with torch.no_grad():
        expected = model(images).exit_logits[exit_index]
        assert torch.equal(small(images).logits, expected)
        assert small(images).exit_logits[0] is not None
        assert len(small(images).exit_logits) == small.num_exits == 1
        answer = small.predict_adaptive(images)
        torch.testing.assert_close(answer.logits, expected, rtol=1e-3, atol=1e-4)
        assert answer.exit_index.tolist() == [0, 0, 0]
    small.save_pretrained(tmp_path / "small")
    model.save_pretrained(tmp_path / "whole")
    bytes_of = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "whole")}
    assert bytes_of["small"] < 0.8 * bytes_of["whole"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    for other in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        state, weights = other.state_dict(), small.state_dict()
        assert list(state) == list(weights)
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
        with torch.no_grad():
            torch.testing.assert_close(other(images).logits, expected, rtol=1e-3, atol=1e-4)
        assert other.exit_config == ExitConfig(thresholds=[], fallback="deepest")
    small.train()(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    projection = small.exit_heads[0].hint_projection
    assert all(
        parameter.grad is not None
        for name, parameter in small.named_parameters()
        if parameter not in set(projection.parameters()) and "pos_embed" not in name
    )
    assert model(images).exit_logits[-1].shape == (3, 4)  # which is whole as before


@pytest.mark.parametrize("exit_index", [2, -1])
def test_truncation_where_there_is_no_early_exit(model, exit_index):
    with pytest.raises(ValueError, match=rf"`exit` is {exit_index}; this network can be truncated at \[0, 1\]"):
        model.truncate(exit=exit_index)
    with pytest.raises(ValueError, match=r"`exit` is '0'; this network can be truncated at \[0, 1\]"):
        model.truncate(exit="0")
    with pytest.raises(ValueError, match=r"`exit` is 0; this network can be truncated at \[\]"):
        model.truncate(exit=0).truncate(exit=0)
    with pytest.raises(ValueError, match="A truncated network ends at its one exit point"):
        ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", truncated=True))
