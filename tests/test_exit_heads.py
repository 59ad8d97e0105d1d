import pytest
import torch

from hf_scan.costs import count_macs
from hf_scan.exit_heads import ConvAttention, ConvClassifier, ExitHead, SeparableAttention

from .conftest import random_scan_model


def shapes(module: torch.nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in module.parameters() if p.ndim == 4]


def test_conv_head_is_the_papers():
    """The layers of the first exit of a CIFAR ResNet-18, as the facts of the authors' code give them."""
    head = ExitHead(64, stride=8, feature_size=512, num_labels=100, attention_type="conv", classifier_type="conv")
    assert shapes(head.attention) == [(64, 64, 3, 3), (64, 64, 4, 4)]
    assert shapes(head.classifier) == [(128, 64, 1, 1), (128, 128, 8, 8), (512, 128, 1, 1)]
    assert head.classifier.fc.weight.shape == (100, 512)
    kinds = [type(module).__name__ for module in head.attention.mask]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "ConvTranspose2d", "BatchNorm2d", "Sigmoid"]
    strided = head.classifier.features[3]
    assert strided.kernel_size == strided.stride == (8, 8)


@pytest.mark.parametrize("attention", [ConvAttention, SeparableAttention])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (9, 6)])
def test_attention_is_a_mask_between_0_and_1(attention, size):
    feature = torch.rand(2, 6, *size) + 0.1
    attended = attention(6).eval()(feature)
    assert attended.shape == feature.shape
    mask = attended / feature
    assert (mask > 0).all()
    assert (mask < 1).all()
    assert mask.std() > 0


@pytest.mark.parametrize("attention_type", ["conv", "separable", "none"])
@pytest.mark.parametrize("classifier_type", ["conv", "separable"])
@pytest.mark.parametrize("channels", [16, 256])
def test_every_kind_gives_a_feature_of_the_deepest_width(attention_type, classifier_type, channels):
    head = ExitHead(channels, 4, 96, 10, attention_type, classifier_type, head_width=32)
    feature, logits = head(torch.randn(2, channels, 16, 16))
    assert feature.shape == (2, 96)
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_stage_behind_never_sees_a_mask(model, images):
    """Whatever the heads do, the deepest logits stay the backbone's, and heads leave the feature as it is."""
    (feature,) = model.run_stage(0, (images,))
    before = feature.clone()
    model.run_exit(0, (feature,))
    assert torch.equal(feature, before)


@pytest.mark.parametrize("backbone", ["cifar_resnet20", "cifar_resnet18", "resnet18", "resnet50"])
def test_default_heads_cost_a_few_percent(backbone):
    costs = count_macs(random_scan_model(backbone=backbone, num_labels=100, image_size=None))
    assert sum(costs.heads[:-1]) / costs.plain < 0.05


def test_conv_classifier_takes_a_map_as_small_as_its_kernel():
    assert ConvClassifier(4, 8, 16, 3).eval()(torch.randn(1, 4, 8, 8))[1].shape == (1, 3)
