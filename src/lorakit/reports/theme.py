"""Colours and axes of the pictures, and how a picture becomes bytes.

The series colours are Okabe & Ito's (2008), told apart with any common colour blindness; scales of values run
through one hue that changes in lightness as well. matplotlib loads when first used.
"""

from __future__ import annotations

import io
import math
import unicodedata
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.reports import wording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

ImageKind = Literal["png", "svg"]

TITLE_SIZE = 12.5
LABEL_SIZE = 10.0
TICK_SIZE = 9.0
TICKS_AT_MOST = 40
_DPI = 100
_LABEL_LENGTH = 24


@dataclass(frozen=True)
class Theme:
    """The colours of a picture: ``ramp`` goes from nothing to all of a value."""

    background: str
    text: str
    muted: str
    grid: str
    base: str
    adapted: str
    validation: str
    update: str
    ramp: tuple[str, str, str]


LIGHT = Theme(
    background="#ffffff",
    text="#1c2733",
    muted="#5b6875",
    grid="#e3e8ee",
    base="#a9b4bf",
    adapted="#0072b2",
    validation="#d55e00",
    update="#009e73",
    ramp=("#f3f6f9", "#7fb3d5", "#003f6b"),
)
DARK = Theme(
    background="#171d25",
    text="#e6e9ed",
    muted="#9aa7b4",
    grid="#2b3541",
    base="#5f6d7b",
    adapted="#56b4e9",
    validation="#e69f00",
    update="#2fbf94",
    ramp=("#1e2731", "#2f7fb0", "#c8e8ff"),
)


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches that belongs to no global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    padding = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12)
    return Figure(figsize=(width, height), dpi=_DPI, layout=padding, facecolor=theme.background)


def to_bytes(figure: Figure, kind: ImageKind = "png") -> bytes:
    """Draw a figure; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    no_date = {"Date": None} if kind == "svg" else {"Software": None}
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorakit"}),
        warnings.catch_warnings(),
    ):
        # A label in a script that the font lacks shows as boxes here; the tables beside it show it in full.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
        figure.savefig(buffer, format=kind, facecolor=figure.get_facecolor(), metadata=no_date)
    return buffer.getvalue()


def ramp(theme: Theme) -> Colormap:
    """Return the colour scale of one hue for shares between 0 and 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lorakit", list(theme.ramp))


def style_axes(axes: Axes, theme: Theme, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Give ``axes`` quiet lines: no frame at the top and right, a light grid below the data."""
    axes.set_facecolor(theme.background)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.tick_params(colors=theme.muted, labelsize=TICK_SIZE, length=0, pad=5)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(True, axis=grid, color=theme.grid, linewidth=0.8)


def set_title(axes: Axes, theme: Theme, title: str, remark: str = "") -> None:
    """Write a title at the left, and a remark in small letters below it."""
    axes.set_title(
        title,
        loc="left",
        fontsize=TITLE_SIZE,
        fontweight="bold",
        color=theme.text,
        pad=22 if remark else 10,
        parse_math=False,
    )
    if remark:
        axes.annotate(
            remark,
            xy=(0.0, 1.0),
            xycoords="axes fraction",
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=TICK_SIZE,
            color=theme.muted,
            annotation_clip=False,
            parse_math=False,
        )


def set_axis_labels(axes: Axes, theme: Theme, x: str = "", y: str = "") -> None:
    """Name the axes, each with its unit."""
    axes.set_xlabel(x, fontsize=LABEL_SIZE, color=theme.text, labelpad=6)
    axes.set_ylabel(y, fontsize=LABEL_SIZE, color=theme.text, labelpad=6)


def drawn_label(text: str, length: int = _LABEL_LENGTH) -> str:
    """Prepare a label of the data for a picture: one line, short, without control or format characters."""
    flat = " ".join(wording.printable(text).split())
    return wording.shortened(
        "".join(character for character in flat if unicodedata.category(character) != "Cf"), length
    )


def every_nth(total: int) -> list[int]:
    """Return evenly spaced indices, so few that their labels do not touch."""
    return list(range(0, total, max(1, math.ceil(total / TICKS_AT_MOST))))


def say_nothing_here(axes: Axes, theme: Theme, text: str) -> None:
    """Say in the middle of ``axes`` that there is nothing to draw."""
    axes.text(
        0.5,
        0.5,
        text,
        transform=axes.transAxes,
        ha="center",
        va="center",
        color=theme.muted,
        fontsize=LABEL_SIZE,
    )
