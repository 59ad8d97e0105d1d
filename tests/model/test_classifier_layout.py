import pytest
import torch
import torchvision
from torch import nn

from hf_scan.model.classifier_layout import block_names, split_classifier
from hf_scan.model.exit_places import find_places, taps_of
from hf_scan.model.stages import StageState, cut_network


SIZE = 64


def strided() -> nn.Sequential:
    """Without any pooling: the last map is flattened."""
    convolutions = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 64, 16), nn.ReLU(), nn.Linear(16, 7))


class Wrapped(nn.Module):
    """A network in another, which does nothing but call it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torchvision.models.resnet18(num_classes=7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)


@pytest.mark.parametrize(
    ("make", "last", "channels", "reduction", "width"),
    [
        (lambda: torchvision.models.resnet18(num_classes=7), "layer4", 512, 32, 512),
        (lambda: torchvision.models.squeezenet1_1(num_classes=7), "features", 512, 21, 7),
        (lambda: torchvision.models.vgg11(num_classes=7), "avgpool", 512, 8, 4096),
        (strided, "3", 8, 8, 16),
        (Wrapped, "inner.layer4", 512, 32, 512),
    ],
)
def test_the_classifier_is_what_stands_behind_the_last_map(make, last, channels, reduction, width):
    torch.manual_seed(0)
    backbone, images = make().eval(), torch.randn(2, 3, SIZE, SIZE)
    stages, head = cut_network(backbone, None, (3, SIZE, SIZE))
    assert (stages[-1].name, stages[-1].channels, stages[-1].reduction) == (last, channels, reduction)
    assert (head.feature_size, head.num_labels) == (width, 7)
    state = StageState.from_images(images)
    with torch.no_grad():
        for stage in stages:
            state = stage.run(backbone, state)
        assert torch.equal(head(backbone, state.values[0]), backbone(images))
        assert head(backbone, state.values[0], pre_logits=True).shape == (2, width)


def test_taps_are_the_last_places_of_each_size():
    with torch.device("meta"):
        taps = taps_of(torchvision.models.mobilenet_v2(), (3, SIZE, SIZE))
        tokens = torchvision.models.vit_b_16(image_size=SIZE)
        found = find_places(tokens, (3, SIZE, SIZE))
    assert [(tap["module"], tap["num_chs"], tap["reduction"]) for tap in taps] == [
        ("features.1", 16, 2),
        ("features.3", 24, 4),
        ("features.6", 32, 8),
        ("features.13", 96, 16),
        ("features", 1280, 32),
    ]
    names = [f"encoder.layers.encoder_layer_{index}" for index in range(11)]
    assert [place.name for place in found.places] == [*names, "encoder.layers"]
    assert {(place.channels, place.reduction, place.num_prefix_tokens) for place in found.places} == {(768, 16, 1)}


def test_blocks_are_not_looked_into():
    names = block_names(torchvision.models.mobilenet_v3_small())
    assert "features.4" in names
    assert not [name for name in names if name.startswith("features.4.")]


def test_a_network_without_a_map_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    with pytest.raises(ValueError, match="Sequential has no map in front of its classifier"):
        split_classifier(flat, [], (3, 16, 16))
