# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Strided depthwise convolutions keep float32 where the rest is trained in bfloat16 on a CPU."""

import pytest
import torch
from torch import nn

from hf_scan.training.precision import float32_strided_depthwise


LAYERS = {
    "depthwise, stride 2": (nn.Conv2d(8, 8, 3, stride=2, groups=8), torch.float32),
    "grouped, stride 2": (nn.Conv2d(8, 8, 3, stride=2, groups=2), torch.float32),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), torch.bfloat16),
    "stride 2": (nn.Conv2d(8, 8, 3, stride=2), torch.bfloat16),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_strided_depthwise_convolutions_alone_keep_float32(kind):
    layer, expected = LAYERS[kind]
    network = nn.Sequential(nn.Conv2d(3, 8, 1), layer)
    images = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), float32_strided_depthwise(network):
        inside = network(images)
        inside.float().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = network(images)
    assert (inside.dtype, after.dtype) == (expected, torch.bfloat16)
    assert "forward" not in vars(layer)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_without_autocast_nothing_changes():
    layer, _ = LAYERS["depthwise, stride 2"]
    images = torch.rand(2, 8, 8, 8)
    plain = layer(images)
    with float32_strided_depthwise(layer):
        assert torch.equal(layer(images), plain)


def test_an_error_restores_the_layers():
    layer, _ = LAYERS["depthwise, stride 2"]
    with pytest.raises(RuntimeError, match="stop"), float32_strided_depthwise(layer):
        raise RuntimeError("stop")
    assert "forward" not in vars(layer)


def test_both_trainers_use_it(tmp_path):
    """In a run with bfloat16, the network's strided depthwise convolutions return float32, with exits and without."""
    from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments
    from hf_scan.training.baseline import plain_copy
    from hf_scan.training.checkpoints import CheckedTrainer

    torch.manual_seed(0)
    rows = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(4)]
    args = ScanTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", bf16=True, use_cpu=True, report_to="none"
    )
    model = ScanForImageClassification(ScanConfig(backbone="efficientnet_lite0", num_labels=2, image_size=32))
    found: set[torch.dtype] = set()
    for network, trainer in ((model, ScanTrainer), (plain_copy(model), CheckedTrainer)):
        found.clear()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1 and max(layer.stride) > 1:
                layer.register_forward_hook(lambda _layer, _input, output: found.add(output.dtype))
        trainer(network, args, train_dataset=rows).train()
        assert found == {torch.float32}
