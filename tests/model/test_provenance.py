"""Which images weights were trained on, as text."""

import pytest

from hf_scan.model.provenance import join_trained_on, known_parts, unknown_images, unknown_parts


@pytest.mark.parametrize(
    ("before", "now", "joined"),
    [
        (None, None, None),
        (None, "1: aa", "1: aa"),
        ("1: aa", None, "1: aa"),
        ("1: aa; 2: bb cc", "1: aa", "2: bb cc; 1: aa"),  # each once, the last training's last
    ],
)
def test_parts_are_joined(before, now, joined):
    assert join_trained_on(before, now) == joined


def test_unknown_images_are_one_part_whatever_they_are_called():
    named = unknown_images("weights; of\nsomebody")
    assert unknown_parts(named) == ["weights, of somebody"]
    joined = join_trained_on(named, "1: aa")
    assert known_parts(joined) == ["1: aa"]
    assert unknown_parts(joined) == ["weights, of somebody"]
    assert known_parts(None) == unknown_parts(None) == []
