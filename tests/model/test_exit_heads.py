import pytest
import torch

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.costs import count_macs
from hf_scan.model.exit_heads import (
    ConvAttention,
    ConvClassifier,
    ExitHead,
    MapMean,
    NearestAttention,
    SeparableAttention,
)
from hf_scan.model.stages import StageState


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


@pytest.mark.parametrize("attention", [ConvAttention, SeparableAttention, NearestAttention])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (9, 6)])
def test_attention_is_a_mask_between_0_and_1(attention, size):
    feature = torch.rand(2, 6, *size) + 0.1
    mask = attention(6).eval()(feature)
    assert mask.shape == feature.shape
    assert (mask > 0).all()
    assert (mask < 1).all()
    assert mask.std() > 0


@pytest.mark.parametrize("width", [2, 6])
def test_a_mask_that_repeats_values_is_twice_the_smaller_one_cropped(width):
    for height in range(1, 66):
        mask, feature = torch.randn(1, 2, (height + 1) // 2, width // 2), torch.empty(1, 2, height, width)
        twice = mask.sigmoid().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        assert torch.equal(NearestAttention.fit(mask, feature), twice[..., :height, :width]), height


@pytest.mark.parametrize("attention_type", ["conv", "separable", "nearest", "none"])
@pytest.mark.parametrize("classifier_type", ["conv", "separable", "chain"])
@pytest.mark.parametrize("channels", [16, 256])
def test_every_kind_gives_a_feature_of_the_deepest_width(attention_type, classifier_type, channels):
    head = ExitHead(channels, 4, 96, 10, attention_type, classifier_type, head_width=32)
    feature, logits, mask = head(torch.randn(2, channels, 16, 16))
    assert feature.shape == (2, 96)
    assert logits.shape == (2, 10)
    assert (mask is None) == (attention_type == "none")
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_stage_behind_never_sees_a_mask(model, images):
    """Whatever the heads do, the deepest logits stay the backbone's, and heads leave the feature as it is."""
    state = model.run_stage(0, StageState.from_images(images))
    (feature,) = state.values
    before = feature.clone()
    model.run_exit(0, state)
    assert torch.equal(feature, before)


@pytest.mark.parametrize(
    "backbone",
    """
    cifar_resnet20 cifar_resnet18 cifar_resnet152 cifar_vgg16_bn cifar_wrn44_8 resnet18 resnet50 densenet121 vgg16_bn
    efficientnet_b0 mobilenetv3_large_100 ghostnet_100 rexnet_100 hgnetv2_b0 convnext_tiny
    swin_tiny_patch4_window7_224 vit_small_patch16_224 mobilevit_s
    """.split(),  # noqa: SIM905
)
@pytest.mark.parametrize(("classifier_type", "budget"), [("chain", 0.1), ("separable", 0.05)])
def test_heads_cost_a_few_percent(backbone, classifier_type, budget):
    """On plain networks and on frugal ones, at 1,000 classes and the default size."""
    with torch.device("meta"):
        model = ScanForImageClassification(
            ScanConfig(
                backbone=backbone,
                num_labels=100 if backbone.startswith("cifar_") else 1000,
                classifier_type=classifier_type,
            )
        )
    costs = count_macs(model)
    assert 0 < sum(costs.heads[:-1]) < budget * costs.plain


def test_a_chain_is_as_wide_as_its_part_of_the_budget_pays_for():
    """Half the deepest width at most; narrower where maps are fine, and where the whole network is narrow."""

    def widths(backbone, classifier_type="chain", **kwargs):
        config = ScanConfig(backbone=backbone, classifier_type=classifier_type, **kwargs)
        return ScanForImageClassification(config).config.head_width

    half = {"channels": [32, 64, 128, 256]}
    assert widths("cifar_resnet18", backbone_kwargs=half) == [64, 128, 128]
    assert widths("cifar_resnet20") == [32, 64]
    assert widths("cifar_resnet20", head_width=48) == [48, 48]
    assert widths("cifar_resnet20", head_width=[16, 32]) == [16, 32]
    assert widths("cifar_resnet20", classifier_type="separable") == [64, 64]
    with pytest.raises(ValueError, match="3 numbers; the network has 2 early exits"):
        widths("cifar_resnet20", head_width=[16, 32, 64])


def test_a_configuration_written_before_there_were_chains_gives_the_heads_of_then():
    """Every configuration that was saved names its kinds of head, so defaults can change."""
    saved = {"backbone": "cifar_resnet20", "attention_type": "separable", "classifier_type": "separable"}
    model = ScanForImageClassification(ScanConfig.from_dict({**saved, "model_type": "scan", "head_width": 64}))
    first = {name: tuple(weight.shape) for name, weight in model.exit_heads[0].named_parameters() if weight.ndim > 1}
    assert first == {
        "squeeze.0.weight": (16, 1, 2, 2),
        "squeeze.1.weight": (64, 16, 1, 1),
        "attention.mask.0.weight": (64, 1, 3, 3),
        "attention.mask.1.weight": (64, 64, 1, 1),
        "attention.mask.4.weight": (64, 1, 3, 3),
        "attention.mask.5.weight": (64, 64, 1, 1),
        "classifier.features.0.weight": (64, 1, 3, 3),
        "classifier.features.1.weight": (64, 64, 1, 1),
        "classifier.fc.weight": (2, 64),
    }


def test_a_configuration_written_before_features_had_a_width_gives_those_of_then(tmp_path):
    saved = {"backbone": "resnet50", "classifier_type": "chain", "head_width": [256, 256, 256], "model_type": "scan"}
    with torch.device("meta"):
        old = ScanForImageClassification(ScanConfig.from_dict(saved))
        new = ScanForImageClassification(ScanConfig(backbone="resnet50", classifier_type="chain", head_width=256))
        new.config.save_pretrained(tmp_path)
        kept = ScanForImageClassification(ScanConfig.from_pretrained(tmp_path))
    for model, width in ((old, 512), (new, 256), (kept, 256)):
        assert [head.classifier.fc.in_features for head in model.exit_heads] == [width] * 3
        assert [head.hint_projection.out_features for head in model.exit_heads] == [2048] * 3


def test_a_saved_network_keeps_the_widths_that_were_chosen(tmp_path):
    config = ScanConfig(backbone="cifar_resnet20", num_labels=10, classifier_type="chain")
    model = ScanForImageClassification(config)
    for network in (model, model.truncate(1)):
        network.save_pretrained(tmp_path)
        assert ScanForImageClassification.from_pretrained(tmp_path).config.head_width == network.config.head_width
    assert model.truncate(1).config.head_width == [model.config.head_width[1]]


def test_a_cheap_head_works_at_one_width_and_near_the_deepest_map():
    """Whatever the stage's map and width are; also where the map's size is odd."""
    for kind, fine in (("separable", 14), ("chain", 28)):
        for stride, size, expected in ((8, 56, fine), (4, 28, 14), (2, 14, 7), (1, 7, 7), (8, 57, fine)):
            head = ExitHead(24, stride, feature_size=96, num_labels=3, classifier_type=kind, head_width=32)
            assert head.squeeze(torch.randn(1, 24, size, size)).shape == (1, 32, expected, expected)


def test_a_chain_doubles_its_channels_down_to_the_deepest_map():
    """And has two separable convolutions where the way is shorter."""

    def pointwise(stride):
        features = ExitHead(24, stride, 256, 3, "none", "chain", 64).classifier.features
        return [shape[:2] for shape in shapes(features) if shape[2:] == (1, 1)]

    assert pointwise(8) == [(128, 64), (256, 128)]
    assert pointwise(4) == pointwise(2) == pointwise(1) == [(64, 64), (128, 64)]


def test_conv_classifier_takes_a_map_as_small_as_its_kernel():
    assert ConvClassifier(4, 8, 16, 3).eval()(torch.randn(1, 4, 8, 8))[1].shape == (1, 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 8)])
def test_the_mean_of_a_map(size):
    feature = torch.randn(3, 6, *size).to(memory_format=torch.channels_last)
    torch.testing.assert_close(MapMean()(feature), torch.nn.AdaptiveAvgPool2d(1)(feature))
