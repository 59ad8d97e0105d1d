import pytest
import timm
import torch

import hf_scan  # noqa: F401


# Parameters with 100 classes. The wide networks are those of the common public CIFAR-100 code; 0.27 M for ResNet-20
# with 10 classes is in table 6 of the ResNet paper, and 90 outputs of 65 weights are the difference.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar_resnet18", 11.22),
        ("cifar_resnet20", 0.27 + 90 * 65 / 1e6),
        ("cifar_resnet34", 21.33),
        ("cifar_resnet50", 23.71),
        ("cifar_resnet101", 42.70),
        ("cifar_resnet152", 58.34),
    ],
)
def test_parameter_counts_of_the_literature(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_maps_are_those_of_the_paper():
    model = timm.create_model("cifar_resnet18", features_only=True)
    shapes = [tuple(feature.shape[1:]) for feature in model(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_is_a_citizen_of_timm():
    assert "cifar_resnet20" in timm.list_models("cifar_*")
    model = timm.create_model("cifar_resnet20", num_classes=10, in_chans=1)
    assert model.get_classifier().out_features == 10
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    model.reset_classifier(0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, model.num_features)


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20").eval()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients))
