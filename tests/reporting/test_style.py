import itertools

import numpy as np
import pytest
from PIL import Image

from hf_scan.reporting.plotting import plot_exit_shares
from hf_scan.reporting.style import COLOURS, LOOKS, colour_of, ink_on, new_figure


def channels(colour: str) -> np.ndarray:
    """Linear red, green and blue."""
    values = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    low, high = sorted(float(channels(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (first, second))
    return high / low


def test_text_can_be_read():
    for look in LOOKS.values():
        assert contrast(look.text, look.page) > 7
    for colour in COLOURS:
        assert contrast(ink_on(colour), colour) > 3.5
        assert all(contrast(colour, look.page) > 2 for look in LOOKS.values())


def test_colours_differ_for_those_who_do_not_see_red_or_green():
    # Machado et al., "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009.
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    for seen in (np.eye(3), np.array(protan), np.array(deutan)):
        colours = [seen @ channels(colour) for colour in COLOURS]
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)) > 0.1
    assert colour_of(len(COLOURS)) == COLOURS[0]


@pytest.mark.parametrize("theme", sorted(LOOKS))
def test_bars_are_as_long_as_shares(theme, tmp_path):
    plot_exit_shares({"test": [0.75, 0.25]}, ["exit 0", "exit 1"], tmp_path / "shares.png", theme=theme)
    pixels = np.asarray(Image.open(tmp_path / "shares.png").convert("RGB")).astype(int)
    assert "#{:02X}{:02X}{:02X}".format(*pixels[1, 1]) == LOOKS[theme].page
    areas = []
    for index in range(2):
        wanted = [int(colour_of(index)[start : start + 2], 16) for start in (1, 3, 5)]
        alike = (np.abs(pixels - wanted).max(axis=-1) < 3).sum(axis=1)
        areas.append(int(np.median(alike[alike > 100])))
    assert areas[0] / sum(areas) == pytest.approx(0.75, abs=0.02)


def test_unknown_themes():
    with pytest.raises(ValueError, match="`theme` is 'sepia'; expected one of"):
        new_figure(theme="sepia")
