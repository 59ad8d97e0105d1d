"""Where exits are by default, and exit points that are refused."""

import pytest
import timm

import hf_scan  # noqa: F401
from hf_scan.model.stages import cut_into_stages


def test_default_exit_points_are_no_shallower_than_reduction_4():
    assert [stage.reduction for stage in cut_into_stages(timm.create_model("test_resnet"))] == [4, 8, 16, 32]
    assert [stage.reduction for stage in cut_into_stages(timm.create_model("cifar_resnet18"))] == [1, 2, 4, 8]


def test_a_network_without_a_pyramid_exits_at_the_quarters():
    stages = cut_into_stages(timm.create_model("deit_tiny_patch16_224"))
    assert [stage.name for stage in stages] == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]


@pytest.mark.parametrize(
    ("exit_points", "message"),
    [
        (["layer9"], r"holds 'layer9', which does not exist\. .*'layer1'"),
        ([7], "holds 7, which does not exist"),
        ([-1], "holds -1, which does not exist"),
        (["layer4"], "holds 'layer4', where the backbone's own classifier stands"),
        (["layer3", "layer1"], "not in order"),
        (["layer3.0", "layer2.0"], r"does not run \['layer3.0', 'layer2.0'\] in this order"),
        ([1, 1], "names a place twice"),
        ([], "names a place twice or none"),
        ([""], "holds '', which does not exist"),
        (["layer4.0.conv1"], r"holds 'layer4.0.conv1', which stands in a branch"),
        (["layer2.0.downsample"], r"holds 'layer2.0.downsample', which stands in a branch"),
        (["fc"], "holds 'fc', which ResNet runs 0 times on the way to its final feature; expected once"),
    ],
)
def test_bad_exit_points(exit_points, message):
    with pytest.raises(ValueError, match=message):
        cut_into_stages(timm.create_model("test_resnet"), exit_points)


def test_two_exits_at_one_place_are_refused():
    with pytest.raises(ValueError, match=r"'layer3.0' and 'layer3', which end at the same place\. Keep one"):
        cut_into_stages(timm.create_model("test_resnet"), ["layer3.0", "layer3"])
