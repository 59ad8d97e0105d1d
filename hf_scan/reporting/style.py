# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The look of every picture: colours for colour-blind people too, sizes for a README column, light and dark."""

from dataclasses import dataclass
from typing import Any, Literal

from ..extras import require_extra


Theme = Literal["light", "dark"]

# Okabe and Ito, "Color Universal Design", 2008, without its yellow and black, which one of the two themes hides. One
# for each exit from shallow to deep, and again from the start. Every picture also writes what a colour stands for.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# Lines that are no exit: the plain network, the diagonal, what is compared with.
NEUTRAL = "#8A8F98"
# The point that was chosen.
CHOSEN = "#D55E00"

# GitHub's and the Hub's pages show a picture some 800 pixels wide: 7 inches at 120 points each, with text of 9 points.
WIDTH = 7.0
DPI = 120
FONT_SIZE = 9.5


@dataclass(frozen=True)
class Look:
    """The colours of a theme: the page behind the picture, text and lines, and the grid."""

    page: str
    text: str
    grid: str


LOOKS: dict[str, Look] = {
    "light": Look(page="#FFFFFF", text="#1F2328", grid="#D8DEE4"),
    "dark": Look(page="#0D1117", text="#E6EDF3", grid="#30363D"),
}


def colour_of(exit_index: int) -> str:
    """Return the colour of an exit."""
    return COLOURS[exit_index % len(COLOURS)]


def ink_on(colour: str) -> str:
    """
    Return the colour of a text that is read on another colour: white or nearly black, by WCAG's relative luminance.

    Example:

    ```python
    >>> from hf_scan.reporting.style import ink_on

    >>> ink_on("#0072B2"), ink_on("#E69F00")
    ('#FFFFFF', '#1F2328')
    ```
    """
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
    return "#FFFFFF" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.065 else "#1F2328"


def new_figure(width: float = WIDTH, height: float = 3.6, theme: Theme = "light") -> Any:
    """
    Return an empty Matplotlib figure in the look of a theme.

    Args:
        width (`float`, *optional*, defaults to 7.0): Inches.
        height (`float`, *optional*, defaults to 3.6): Inches.
        theme (`str`, *optional*, defaults to `"light"`): `"light"` or `"dark"`, as the page around it.

    Raises:
        `ImportError`: if Matplotlib is not installed.
        `ValueError`: if there is no such theme.
    """
    if theme not in LOOKS:
        raise ValueError(f"`theme` is {theme!r}; expected one of {sorted(LOOKS)}.")
    require_extra("plot", "Drawing")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=LOOKS[theme].page)


def dress(axis: Any, theme: Theme = "light", grid: str | None = "both") -> None:
    """
    Give an axis the look of a theme: no frame on top and on the right, a quiet grid, text of one size.

    Args:
        axis (`matplotlib.axes.Axes`): After everything is drawn in it.
        theme (`str`, *optional*, defaults to `"light"`): As for [`new_figure`].
        grid (`str`, *optional*, defaults to `"both"`): `"x"`, `"y"`, `"both"` or None.
    """
    look = LOOKS[theme]
    axis.set_facecolor(look.page)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(look.grid)
    axis.tick_params(colors=look.text, labelsize=FONT_SIZE - 1, length=0)
    if grid is not None:
        axis.grid(axis=grid, color=look.grid, linewidth=0.7)
        axis.set_axisbelow(True)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set(color=look.text, fontsize=FONT_SIZE)
    axis.title.set(fontsize=FONT_SIZE + 0.5)
    if (legend := axis.get_legend()) is not None:
        legend.set_frame_on(False)
        for entry in legend.get_texts():
            entry.set(color=look.text, fontsize=FONT_SIZE - 1)


def save_figure(figure: Any, path: Any) -> None:
    """Write a figure, in the format that the file's ending names."""
    figure.savefig(path, dpi=DPI, facecolor=figure.get_facecolor())


__all__ = [
    "CHOSEN",
    "COLOURS",
    "DPI",
    "FONT_SIZE",
    "LOOKS",
    "NEUTRAL",
    "WIDTH",
    "Theme",
    "colour_of",
    "dress",
    "ink_on",
    "new_figure",
    "save_figure",
]
