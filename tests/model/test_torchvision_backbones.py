import pytest
import torch
import torchvision
from torch import nn

from hf_scan.model import torchvision_backbones
from hf_scan.model.torchvision_backbones import check_torchvision, create_torchvision, find_torchvision


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2"])
def test_a_network_is_found_by_its_shapes(name):
    with torch.device("meta"):
        plain = getattr(torchvision.models, name)(num_classes=7)
    assert find_torchvision(plain, 7) == name


def test_other_networks_are_not_found():
    with torch.device("meta"):
        changed = torchvision.models.resnet18(num_classes=7)
        changed.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 7))
    assert find_torchvision(changed, 7) is None
    assert find_torchvision(nn.Linear(2, 2), 2) is None


def test_what_names_weights_is_refused():
    with pytest.raises(ValueError, match=r"names \['pretrained', 'weights'\], which would make torchvision fetch"):
        check_torchvision("resnet18", {"weights": "DEFAULT", "pretrained": True, "groups": 1})
    with pytest.raises(ValueError, match="expected the name of a classifier of torchvision"):
        check_torchvision("os.system", {})
    with pytest.raises(ValueError, match="'fcn_resnet50', which this version of torchvision does not know"):
        create_torchvision("fcn_resnet50", 7, {})


def test_torchvision_need_not_be_installed(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(torchvision_backbones, "import_module", missing)
    with pytest.raises(ImportError, match=r"one of torchvision \(No module named 'torchvision.models'\)\. `pip"):
        create_torchvision("resnet18", 7, {})
