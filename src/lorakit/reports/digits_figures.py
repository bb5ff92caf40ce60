"""The drawings of the digits demo: errors per digit, confusion matrices, digits that changed sides."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lorakit.reports import wording
from lorakit.reports.digits_record import ChangedDigit, DigitsSummary, Measured
from lorakit.reports.theme import (
    LABEL_SIZE,
    LIGHT,
    TICK_SIZE,
    ImageKind,
    Theme,
    new_figure,
    ramp,
    set_axis_labels,
    set_title,
    style_axes,
    to_bytes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Pixels = Any
"""A numpy array of bytes, ``[n, 28, 28]``."""

_DARK_CELL = 0.55
_WITH = {"alone": "trained on it alone", "replay": "with replay of the others"}


def spread(items: Sequence[ChangedDigit], most: int) -> list[ChangedDigit]:
    """Return at most ``most`` items, evenly spread over all of them."""
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]


def digit_png(pixels: Pixels) -> bytes:
    """Return one image ``[28, 28]`` as a PNG of its own size, white ink on black."""
    from matplotlib.image import imsave

    buffer, unsigned = io.BytesIO(), cast("dict[str, str]", {"Software": None})
    imsave(buffer, pixels, cmap="gray", vmin=0, vmax=255, format="png", metadata=unsigned)
    return buffer.getvalue()


def confusion(measured: Measured, title: str, remark: str, kind: ImageKind = "svg", theme: Theme = LIGHT) -> bytes:
    """Draw one confusion matrix."""
    figure = new_figure(4.1, 4.5, theme)
    _draw_confusion(figure.subplots(), measured, title, remark, theme)
    return to_bytes(figure, kind)


def errors_per_digit(summary: DigitsSummary, kind: ImageKind = "svg", theme: Theme = LIGHT) -> bytes:
    """Draw the errors on each digit before, alone and with replay."""
    figure = new_figure(10.0, 3.9, theme)
    _draw_errors(figure.subplots(), summary, theme)
    return to_bytes(figure, kind)


def update_sizes(summary: DigitsSummary, kind: ImageKind = "svg", theme: Theme = LIGHT) -> bytes:
    """Draw the one singular value of each layer's update, and its norm in percent of the base weight's."""
    figure = new_figure(10.0, 2.9, theme)
    values, norms = figure.subplots(1, 2, sharey=True)
    colors = (theme.validation, theme.adapted)
    for axes, title, label in (
        (values, "Singular value of the update", "singular value of scale · B A"),
        (norms, "Its size beside the base weight", "norm, % of base weight's"),
    ):
        style_axes(axes, theme, grid="x")
        set_title(axes, theme, title)
        set_axis_labels(axes, theme, x=label)
    for number, (adapter, color) in enumerate(zip(summary.adapters, colors, strict=True)):
        places = [layer + 0.38 * (number - 0.5) for layer in range(len(adapter.layers))]
        largest = [layer.singular_values[0] for layer in adapter.layers]
        shares = [100.0 * layer.relative_norm for layer in adapter.layers]
        for axes, lengths in ((values, largest), (norms, shares)):
            axes.barh(places, lengths, height=0.34, color=color, label=adapter.name)
            for place, length in zip(places, lengths, strict=True):
                axes.annotate(
                    wording.significant(length),
                    (length, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=TICK_SIZE - 0.5,
                    color=theme.text,
                )
    paths = [layer.path for layer in summary.adapters[0].layers]
    values.set_yticks(range(len(paths)), paths, parse_math=False)
    values.set_ylim(len(paths) - 0.4, -0.6)
    for axes in (values, norms):
        axes.margins(x=0.14)
        axes.set_xlim(left=0.0)
    values.tick_params(axis="y", labelcolor=theme.text)
    norms.tick_params(axis="y", labelleft=False)
    norms.legend(frameon=False, fontsize=TICK_SIZE + 0.5, labelcolor=theme.text, loc="best")
    return to_bytes(figure, kind)


def overview_picture(summary: DigitsSummary, pixels: Pixels, theme: Theme = LIGHT) -> bytes:
    """Draw one wide PNG, 1600 x 900: confusions, errors per digit, and digits that changed sides.

    Args:
        summary: what was found.
        pixels: the test images.
        theme: the colours.
    """
    figure = new_figure(16.0, 9.0, theme)
    totals = ", ".join(f"{adapter.after.total} {_WITH[adapter.name]}" for adapter in summary.adapters)
    figure.suptitle(
        f"{wording.count(summary.num_added)} numbers ({summary.percent:.3f} %) for digit {summary.digit}: "
        f"{summary.before.total} errors in all before, {totals}",
        x=0.016,
        ha="left",
        fontsize=16,
        fontweight="bold",
        color=theme.text,
    )
    grid = figure.add_gridspec(2, 1, height_ratios=(1.15, 1.0), hspace=0.03)
    top, bottom = (figure.add_subfigure(cell, facecolor=theme.background) for cell in (grid[0], grid[1]))
    for axes, (title, measured) in zip(top.subplots(1, 3), named_results(summary), strict=True):
        _draw_confusion(axes, measured, title, result_remark(measured), theme)
    cells = bottom.add_gridspec(1, 2, width_ratios=(1.0, 1.0), wspace=0.03)
    left, right = (bottom.add_subfigure(cell, facecolor=theme.background) for cell in (cells[0], cells[1]))
    _draw_errors(left.subplots(), summary, theme)
    _draw_changed(right, summary, pixels, theme)
    return to_bytes(figure)


def named_results(summary: DigitsSummary) -> list[tuple[str, Measured]]:
    """Return the passes that differ, each with its title."""
    titles = {"alone": f"Adapter 'alone': {summary.digit} only", "replay": "Adapter 'replay': others too"}
    return [("Before", summary.before), *((titles[a.name], a.after) for a in summary.adapters)]


def result_remark(measured: Measured) -> str:
    """Write errors and accuracy of one pass."""
    return f"{wording.plural(measured.total, 'error')}, {wording.percent(measured.accuracy)} right"


def _draw_confusion(axes: Axes, measured: Measured, title: str, remark: str, theme: Theme) -> None:
    style_axes(axes, theme)
    set_title(axes, theme, title, remark)
    shares = [[cell / max(1, sum(row)) for cell in row] for row in measured.confusion]
    axes.imshow(shares, cmap=ramp(theme), vmin=0.0, vmax=1.0, aspect="equal", interpolation="nearest")
    for truth, row in enumerate(measured.confusion):
        for taken, images in enumerate(row):
            if images:
                dark = shares[truth][taken] > _DARK_CELL
                axes.text(
                    taken,
                    truth,
                    str(images),
                    ha="center",
                    va="center",
                    fontsize=TICK_SIZE - (1.5 if images < 1000 else 3.0),
                    color=theme.background if dark else theme.text,
                    weight="normal" if truth == taken else "bold",
                )
    for spine in axes.spines.values():
        spine.set_visible(False)
    digits = range(len(measured.confusion))
    axes.set_xticks(digits, [str(digit) for digit in digits])
    axes.set_yticks(digits, [str(digit) for digit in digits])
    set_axis_labels(axes, theme, x="read as", y="truth")


def _draw_errors(axes: Axes, summary: DigitsSummary, theme: Theme) -> None:
    style_axes(axes, theme, grid="y")
    set_title(axes, theme, "Errors on each digit", f"of {wording.count(summary.num_test)} test images")
    shown = [("before", summary.before), *((adapter.name, adapter.after) for adapter in summary.adapters)]
    colors = (theme.base, theme.validation, theme.adapted)
    width = 0.27
    for number, ((name, measured), color) in enumerate(zip(shown, colors, strict=True)):
        places = [digit + width * (number - 1) for digit in range(len(measured.errors))]
        axes.bar(places, measured.errors, width=width * 0.92, color=color, label=f"{name}: {measured.total} in all")
        for place, errors in zip(places, measured.errors, strict=True):
            axes.annotate(
                str(errors),
                (place, errors),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=TICK_SIZE - 2.0,
                color=theme.muted,
            )
    digits = range(len(summary.before.errors))
    axes.set_xticks(digits, [str(digit) for digit in digits])
    for label in axes.get_xticklabels():
        own = label.get_text() == str(summary.digit)
        label.set(color=theme.text if own else theme.muted, weight="bold" if own else "normal")
    axes.margins(y=0.24)
    axes.set_ylim(bottom=0.0)
    set_axis_labels(axes, theme, x=f"digit (the adapters are trained on {summary.digit})", y="errors")
    axes.legend(frameon=False, fontsize=TICK_SIZE + 0.5, labelcolor=theme.text, loc="upper right", ncols=3)


def _draw_changed(figure: FigureBase, summary: DigitsSummary, pixels: Pixels, theme: Theme) -> None:
    """Draw a row of images that each adapter repaired and a row that it broke."""
    rows = [
        (f"'{adapter.name}' {verb} {wording.count(len(items))}", items)
        for adapter in summary.adapters
        for verb, items in (("repaired", adapter.repaired), ("broke", adapter.broken))
    ]
    columns = 9
    grid = figure.subplots(len(rows), 1)
    for axes, (name, items) in zip(grid, rows, strict=True):
        _draw_strip(axes, spread(items, columns), columns, pixels, theme)
        axes.text(-0.35, 0.5, name, ha="right", va="center", fontsize=LABEL_SIZE, color=theme.text)
    set_title(grid[0], theme, "Digits that changed sides", "truth: read before → read now; some of each")


def _draw_strip(axes: Axes, items: Sequence[ChangedDigit], columns: int, pixels: Pixels, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.axis("off")
    axes.set_xlim(-3.2, columns * 1.25)
    axes.set_ylim(-0.42, 1.0)
    axes.set_aspect("equal")
    if not items:
        axes.text(0.0, 0.5, "none", va="center", color=theme.muted, fontsize=LABEL_SIZE)
    for place, item in enumerate(items):
        left = place * 1.25
        axes.imshow(pixels[item.index], cmap="gray", vmin=0, vmax=255, extent=(left, left + 1.0, 0.0, 1.0), zorder=2)
        axes.text(
            left + 0.5,
            -0.06,
            f"{item.truth}: {item.before} → {item.after}",
            ha="center",
            va="top",
            fontsize=TICK_SIZE - 1.5,
            color=theme.muted,
        )
    axes.set_xlim(-3.2, columns * 1.25)
    axes.set_ylim(-0.42, 1.0)
