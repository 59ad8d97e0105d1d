import pytest
import timm
import torch

import hf_scan  # noqa: F401


# Parameters with 100 classes. The wide ResNets and VGG-16 are those of the common public CIFAR-100 code; VGG-19 has
# three more convolutions with batch norm. 0.27, 0.46 and 0.85 M for the narrow ones with 10 classes are in table 6 of
# the ResNet paper, and 90 outputs of 65 weights are the difference, besides two small projections. WRN-22-8, -28-10
# and -40-8 with 10 classes are in table 4 of the Wide ResNet paper; WRN-46-8 has one more block of two convolutions in
# each stage.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar_resnet18", 11.22),
        ("cifar_resnet20", 0.27 + 90 * 65 / 1e6),
        ("cifar_resnet32", 0.46 + 90 * 65 / 1e6),
        ("cifar_resnet34", 21.33),
        ("cifar_resnet50", 23.71),
        ("cifar_resnet56", 0.85 + 90 * 65 / 1e6),
        ("cifar_resnet101", 42.70),
        ("cifar_resnet152", 58.34),
        ("cifar_vgg16_bn", 34.02),
        ("cifar_vgg19_bn", 34.02 + (9 * (256**2 + 2 * 512**2) + 3 * (256 + 2 * 512)) / 1e6),
        ("cifar_wrn20_8", 17.2),
        ("cifar_wrn28_10", 36.5),
        ("cifar_wrn44_8", 35.7 + 2 * 9 * (128**2 + 256**2 + 512**2) / 1e6),
    ],
)
def test_parameter_counts_of_the_literature(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.008, rel=0.003
    )


def test_maps_are_those_of_the_paper():
    model = timm.create_model("cifar_resnet18", features_only=True)
    shapes = [tuple(feature.shape[1:]) for feature in model(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_maps_of_a_vgg_and_a_wide_resnet():
    images = torch.zeros(2, 3, 32, 32)
    shapes = [tuple(f.shape[1:]) for f in timm.create_model("cifar_vgg16_bn", features_only=True)(images)]
    assert shapes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    shapes = [tuple(f.shape[1:]) for f in timm.create_model("cifar_wrn20_8", features_only=True)(images)]
    assert shapes == [(128, 32, 32), (256, 16, 16), (512, 8, 8)]


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16_bn", "cifar_wrn20_8"])
def test_is_a_citizen_of_timm(name):
    assert name in timm.list_models("cifar_*")
    model = timm.create_model(name, num_classes=10, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32)
    assert model.get_classifier().out_features == 10
    assert model(images).shape == (2, 10)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.head_hidden_size)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg16_bn", "cifar_wrn20_8"])
def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients))
