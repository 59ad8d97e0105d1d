import pytest
import timm
import torch
from torch import nn

import hf_scan  # noqa: F401
from hf_scan.stages import cut_into_stages


# One small network of each way in which timm builds them: flat children, numbered stages, one long Sequential,
# nested blocks with a tail behind the last tap, dense connections, anti-aliasing buffers, channels last.
BACKBONES = [
    "cifar_resnet20",
    "cifar_resnet50",
    "test_resnet",
    "resnetblur18",
    "convnext_atto",
    "regnety_002",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "densenet121",
    "repvit_m1",
    "test_vgg",
    "swin_tiny_patch4_window7_224",
]


def create(name: str) -> nn.Module:
    if name == "test_vgg":  # no small one is registered
        return timm.models.VGG(cfg=[8, "M", 16, "M", 16, "M", 16, "M", 32, "M"], num_classes=10)
    return timm.create_model(name, num_classes=10)


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_equal_the_plain_model_bit_for_bit(name):
    torch.manual_seed(0)
    backbone = create(name).eval()
    if name == "test_vgg":
        backbone.pretrained_cfg = {"input_size": (3, 64, 64)}
    images = torch.randn(2, *backbone.pretrained_cfg["input_size"])
    stages = cut_into_stages(backbone)
    with torch.no_grad():
        feature = images
        for stage in stages:
            feature = stage.run(backbone, feature)
            if stage is not stages[-1]:
                assert feature.shape[1 if stage.channels_first else 3] == stage.channels
                assert feature.shape[2] == images.shape[2] // stage.reduction
        assert torch.equal(backbone.forward_head(feature), backbone(images))


@pytest.mark.parametrize("exit_points", [[1], [0, 2], ["layer2"], ["layer1", "layer3"], [0, 1, 2, 3]])
def test_any_subset_of_exit_points(exit_points):
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    stages = cut_into_stages(backbone, exit_points)
    names = ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert [stage.modules[-1] for stage in stages[:-1]] == [
        names[point] if isinstance(point, int) else point for point in exit_points
    ]
    with torch.no_grad():
        feature = images
        for stage in stages:
            feature = stage.run(backbone, feature)
        assert torch.equal(backbone.forward_head(feature), backbone(images))


def test_default_exit_points_are_no_shallower_than_reduction_4():
    assert [stage.reduction for stage in cut_into_stages(timm.create_model("test_resnet"))] == [4, 8, 16, 32]
    assert [stage.reduction for stage in cut_into_stages(timm.create_model("cifar_resnet18"))] == [1, 2, 4, 8]


def test_cutting_leaves_the_model_as_it_was():
    backbone = timm.create_model("test_resnet")
    backbone.layer1.eval()  # modes differ from module to module
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    cut_into_stages(backbone)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert [module.training for module in backbone.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_cutting_works_on_the_meta_device():
    with torch.device("meta"):
        backbone = timm.create_model("test_resnet")
    assert len(cut_into_stages(backbone)) == 4


@pytest.mark.parametrize("name", ["test_vit", "xception41", "hrnet_w18_small"])
def test_a_model_that_is_no_chain_is_refused(name):
    with torch.device("meta"):
        backbone = timm.create_model(name)
    with pytest.raises(ValueError, match=r"cannot be cut into stages: .* Choose another backbone"):
        cut_into_stages(backbone)


class _Changes(nn.Module):
    """Two stages; between them, outside any module, the feature is changed in place."""

    pretrained_cfg = {"input_size": (3, 8, 8)}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.feature_info = [
            {"num_chs": 4, "reduction": 1, "module": "first"},
            {"num_chs": 4, "reduction": 1, "module": "second"},
        ]

    def forward_features(self, image):
        return self.second(self.first(image).relu_())

    def forward_head(self, feature, pre_logits=False):
        return feature.mean((2, 3))


def test_an_in_place_change_between_modules_is_seen():
    with pytest.raises(ValueError, match="what 'second' receives was not returned by one of its modules"):
        cut_into_stages(_Changes())


@pytest.mark.parametrize(
    ("exit_points", "message"),
    [
        (["layer9"], r"holds 'layer9', which does not exist\. .*'layer1'"),
        ([7], "holds 7, which does not exist"),
        ([-1], "holds -1, which does not exist"),
        (["layer4"], "holds 'layer4', which does not exist"),  # the backbone's own classifier stands there
        (["layer3", "layer1"], "not in order"),
        ([1, 1], "not in order"),
        ([], "not in order or is empty"),
    ],
)
def test_bad_exit_points(exit_points, message):
    with pytest.raises(ValueError, match=message):
        cut_into_stages(timm.create_model("test_resnet"), exit_points)


def test_a_model_without_taps_is_refused():
    with pytest.raises(ValueError, match=r"Linear gives 0 `feature_info` taps; .* needs two or more"):
        cut_into_stages(nn.Linear(2, 2))
