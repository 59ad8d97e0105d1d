"""What is a map, by the shape of what a module returns for two images of 32 x 32 pixels."""

from types import SimpleNamespace

import pytest
import torch

from hf_scan.model.map_shapes import MapShape, describe_map


PLAIN, SWIN = SimpleNamespace(), SimpleNamespace(output_fmt="NHWC")


@pytest.mark.parametrize(
    ("backbone", "shape", "scales", "expected"),
    [
        (PLAIN, (2, 8, 4, 4), [], MapShape(8, 8)),
        (SWIN, (2, 4, 4, 6), [], MapShape(6, 8, channels_last=True)),
        (PLAIN, (2, 4, 4, 6), [], MapShape(6, 8, channels_last=True)),  # the other two are not of one size
        (PLAIN, (2, 8, 7, 7), [], MapShape(8, 4)),  # 32 / 7 is as near as it gets without padding
        (PLAIN, (2, 8, 7, 7), [5], MapShape(8, 5)),  # a tap knows better
        (PLAIN, (2, 17, 8), [], MapShape(8, 8, num_prefix_tokens=1)),
        (SimpleNamespace(num_prefix_tokens=0), (2, 16, 8), [8], MapShape(8, 8, num_prefix_tokens=0)),
        (SimpleNamespace(num_prefix_tokens=0), (2, 17, 8), [8], None),
        (PLAIN, (2, 8), [], None),
        (PLAIN, (1, 8, 4, 4), [], None),  # of a single image
    ],
)
def test_shapes(backbone, shape, scales, expected):
    tensors = [torch.empty(shape, device="meta")]
    assert describe_map(backbone, "block", tensors, (32, 32), scales) == expected


def test_nothing_is_no_map():
    assert describe_map(PLAIN, "block", [], (32, 32), []) is None


def test_the_patches_of_timm_need_not_be_squares():
    backbone = SimpleNamespace(patch_embed=SimpleNamespace(feat_ratio=lambda as_scalar: (8, 4)))
    tensors = [torch.empty((2, 4 * 8 + 1, 6), device="meta")]
    assert describe_map(backbone, "block", tensors, (32, 32), [8]) == MapShape(6, 8, (8, 4))
