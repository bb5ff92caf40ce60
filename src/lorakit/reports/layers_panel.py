"""The drawing of what each layer learned, readable for a handful of layers and for hundreds.

Where a model has numbered blocks: maps with a row per kind of layer and a column per block, and the curves of the
singular values. Else a list of the layers with bars.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.records import LayerSpectrum
from lorakit.reports import wording
from lorakit.reports.spectrum import LayerGroup, LearnedLayer, Read, by_kind, by_path, learned_layers, short_names
from lorakit.reports.theme import (
    TICK_SIZE,
    Theme,
    drawn_label,
    every_nth,
    ramp,
    say_nothing_here,
    set_axis_labels,
    set_title,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

_BLOCKS_AT_LEAST = 3
_KINDS_AT_MOST = 40
_CELLS_WITH_NUMBERS = 8
_NAME_LENGTH = 26
_SMALLEST_TEXT = 5.0
_AROUND_A_MAP = 1.7
"""Inches above and below a map that its title, its axis and its colour scale take."""
_CURVES_NAMED = 14
_LINES = ("-", "--")
# Beside the theme's three: of a middle lightness, so that they can be seen on light and on dark.
_MORE_INKS = ("#cc79a7", "#8c6bb1", "#a6761d", "#7f8c99")


@dataclass(frozen=True)
class LayerMap:
    """One figure of every layer, to be drawn as a map.

    Attributes:
        title, remark: what it is, and its unit.
        read: how to get it from a layer.
        write: how to write it into a cell.
    """

    title: str
    remark: str
    read: Read
    write: Callable[[float], str]


def _relative_percent(layer: LearnedLayer) -> float | None:
    return None if layer.relative_norm is None else 100.0 * layer.relative_norm


def _half_percent(layer: LearnedLayer) -> float:
    return 100.0 * layer.half_energy


RELATIVE_SIZE = LayerMap("Update size", "norm, % of the base weight's", _relative_percent, wording.significant)
SIZE = LayerMap("Update size", "Frobenius norm", lambda layer: layer.norm, wording.significant)
EFFECTIVE_RANK = LayerMap("Effective rank", "directions used", lambda layer: layer.effective_rank, "{:.1f}".format)
HALF_ENERGY = LayerMap("Energy kept", "at half the rank, %", _half_percent, "{:.0f}".format)


def draw_spectrum(figure: FigureBase, spectra: Sequence[LayerSpectrum], theme: Theme) -> None:
    """Draw every layer's size, effective rank and singular values."""
    layers = learned_layers(spectra)
    if not layers:
        axes = figure.subplots()
        style_axes(axes, theme)
        set_title(axes, theme, "Singular values")
        say_nothing_here(axes, theme, "no singular values recorded")
    elif has_depth(layers):
        grid = figure.add_gridspec(2, 1, height_ratios=heights(layers), hspace=0.03)
        above, below = (figure.add_subfigure(cell, facecolor=theme.background) for cell in (grid[0], grid[1]))
        draw_maps(above, layers, usual_maps(layers), theme)
        draw_curves(below, layers, theme)
    else:
        draw_bars(figure, layers, theme)


def draw_quarter(figure: FigureBase, spectra: Sequence[LayerSpectrum], theme: Theme) -> None:
    """Draw as much of it as a quarter of a page holds: the maps without the curves, or the list."""
    layers = learned_layers(spectra)
    if has_depth(layers):
        draw_maps(figure, layers, usual_maps(layers), theme)
    else:
        draw_spectrum(figure, spectra, theme)


def heights(layers: Sequence[LearnedLayer]) -> tuple[float, float]:
    """Return the heights in inches that maps and curves read best at."""
    return 1.7 + 0.33 * max(4, len(by_kind(layers))), 3.4


def has_depth(layers: Sequence[LearnedLayer]) -> bool:
    """Tell whether maps over the blocks say more than a list: three blocks or more, and few kinds of layers."""
    blocks = {layer.block for layer in layers} - {None}
    return len(blocks) >= _BLOCKS_AT_LEAST and len(by_kind(layers)) <= _KINDS_AT_MOST


def usual_maps(layers: Sequence[LearnedLayer]) -> list[LayerMap]:
    """Return the maps that need no more than singular values and, where it is known, the base weight's norm."""
    relative = any(layer.relative_norm is not None for layer in layers)
    return [RELATIVE_SIZE if relative else SIZE, EFFECTIVE_RANK, HALF_ENERGY]


def draw_maps(
    figure: FigureBase, layers: Sequence[LearnedLayer], maps: Sequence[LayerMap], theme: Theme, columns: int = 3
) -> None:
    """Draw maps beside each other, ``columns`` in a row: kinds of layer down, blocks to the right."""
    kinds = by_kind(layers)
    rows = math.ceil(len(maps) / columns)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    names = short_names([group.name for group in kinds], _NAME_LENGTH)
    size = _row_size(figure, rows, len(kinds))
    for place, axes in enumerate(panels.flat):
        if place >= len(maps):
            axes.set_visible(False)
            continue
        style_axes(axes, theme)
        _draw_map(figure, axes, kinds, maps[place], theme, size)
        axes.tick_params(axis="y", labelleft=place % columns == 0, labelcolor=theme.text)
        axes.tick_params(axis="x", labelbottom=place + columns >= len(maps))
        if place + columns >= len(maps):
            set_axis_labels(axes, theme, x="block")
    shown = range(0, len(kinds), max(1, math.ceil(_SMALLEST_TEXT / size)))
    labels = [_row_label(kinds[index], names[kinds[index].name]) for index in shown]
    panels[0][0].set_yticks(shown, labels, parse_math=False, fontsize=max(size, _SMALLEST_TEXT))


def _row_size(figure: Any, rows_of_maps: int, num_kinds: int) -> float:
    """Return the size in points at which labels of neighbouring rows do not touch; it may be too small to be read."""
    from matplotlib.figure import Figure

    whole = figure if isinstance(figure, Figure) else figure.figure
    height = float(figure.bbox.height) / whole.dpi / rows_of_maps - _AROUND_A_MAP
    return min(TICK_SIZE, 0.85 * 72.0 * max(height, 0.1) / num_kinds)


def _row_label(group: LayerGroup, name: str) -> str:
    outside = all(layer.block is None for layer in group.layers)
    return drawn_label(name, _NAME_LENGTH + 4) + (" (no block)" if outside else "")


def _draw_map(
    figure: FigureBase, axes: Axes, kinds: Sequence[LayerGroup], shown: LayerMap, theme: Theme, size: float
) -> None:
    values, blocks = _cells(kinds, shown.read)
    known = [value for row in values for value in row if not math.isnan(value)]
    low, high = _ends(known)
    colors = ramp(theme).with_extremes(bad=theme.background)
    image = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    step = max(1, math.ceil(len(blocks) / 8))
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    set_title(axes, theme, shown.title, shown.remark)
    if not known:
        say_nothing_here(axes, theme, "not\nknown")
        return
    if len(blocks) <= _CELLS_WITH_NUMBERS and size >= _SMALLEST_TEXT:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    _write_cell(axes, image, column, row, shown.write(value), value, min(size, TICK_SIZE - 2))
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.06, pad=0.02, aspect=30)
    bar.ax.tick_params(colors=theme.muted, labelsize=TICK_SIZE - 1, length=0)
    bar.locator = _few_ticks()
    bar.outline.set_visible(False)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a colour scale: those of the values, at least a tenth of the largest apart."""
    high = max(values, default=1.0) or 1.0
    return min(*values, 0.9 * high) if values else 0.0, high


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _write_cell(axes: Axes, image: Any, x: int, y: int, text: str, value: float, size: float) -> None:
    """Write a value into its cell, dark on light colours and light on dark ones."""
    red, green, blue, _ = image.cmap(image.norm(value))
    ink = "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)


def _cells(kinds: Sequence[LayerGroup], read: Read) -> tuple[list[list[float]], list[int]]:
    """Return a figure by kind and block, medians where several layers share a cell, and the blocks' numbers.

    A layer outside the blocks fills its whole row.
    """
    blocks = sorted({layer.block for group in kinds for layer in group.layers if layer.block is not None})
    rows = []
    for group in kinds:
        inside: dict[int | None, list[float]] = {}
        for layer in group.layers:
            value = read(layer)
            if value is not None:
                inside.setdefault(layer.block, []).append(value)
        found = [inside.get(block, inside.get(None, [])) for block in blocks]
        rows.append([statistics.median(values) if values else math.nan for values in found])
    return rows, blocks


def draw_curves(figure: FigureBase, layers: Sequence[LearnedLayer], theme: Theme) -> None:
    """Draw singular values over the largest one of their layer: the median of each kind, every layer behind it."""
    from matplotlib.collections import LineCollection

    axes = figure.subplots()
    style_axes(axes, theme, grid="both")
    longest = max(1, *(layer.rank for layer in layers))
    every = [list(enumerate(curve, start=1)) for layer in layers if (curve := _curve(layer))]
    axes.add_collection(LineCollection(every, colors=theme.base, linewidths=0.6, alpha=0.5, zorder=1))
    kinds = by_kind(layers)
    names = short_names([group.name for group in kinds], _NAME_LENGTH)
    inks = (theme.adapted, theme.validation, theme.update, *_MORE_INKS)
    for index, group in enumerate(kinds if len(kinds) <= _CURVES_NAMED else []):
        curve = _median_curve(group)
        axes.plot(
            range(1, len(curve) + 1),
            curve,
            color=inks[index % len(inks)],
            linestyle=_LINES[index // len(inks) % len(_LINES)],
            linewidth=1.8,
            marker="o" if longest <= 16 else "",
            markersize=3.5,
            label=drawn_label(names[group.name], _NAME_LENGTH + 4),
            zorder=2,
        )
    axes.set_ylim(0.0, 1.03)
    axes.set_xlim(0.7, longest + 0.3)
    axes.locator_params(axis="x", integer=True, nbins=min(16, longest))
    count = len(by_path(layers))
    set_title(axes, theme, "Singular values", f"of the updates of {wording.plural(count, 'layer')}; medians by kind")
    set_axis_labels(axes, theme, x="singular value, largest first", y="value / largest")
    if 1 < len(kinds) <= _CURVES_NAMED:
        legend = axes.legend(
            frameon=False, fontsize=TICK_SIZE, labelcolor=theme.text, loc="upper left", bbox_to_anchor=(1.005, 1.0)
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _curve(layer: LearnedLayer) -> list[float]:
    return [value / layer.largest for value in layer.singular_values] if layer.largest > 0.0 else []


def _median_curve(group: LayerGroup) -> list[float]:
    curves = [curve for layer in group.layers if (curve := _curve(layer))]
    longest = max((len(curve) for curve in curves), default=0)
    return [statistics.median(curve[i] for curve in curves if len(curve) > i) for i in range(longest)]


def draw_bars(figure: FigureBase, layers: Sequence[LearnedLayer], theme: Theme) -> None:
    """Draw every layer's singular values over its largest, its effective rank and its size, one line a layer."""
    heat, ranks, norms = figure.subplots(1, 3, sharey=True, width_ratios=[3.2, 1.5, 1.5])
    for axes in (heat, ranks, norms):
        style_axes(axes, theme, grid=None if axes is heat else "x")
    _draw_heat(figure, heat, layers, theme)
    places = range(len(layers))
    ranks.barh(places, [layer.effective_rank for layer in layers], height=0.7, color=theme.adapted)
    ranks.set_xlim(0.0, max(1, *(len(layer.singular_values) for layer in layers)))
    ranks.locator_params(axis="x", nbins=4, integer=True)
    set_title(ranks, theme, "Effective rank", "directions used")
    set_axis_labels(ranks, theme, x="exp(entropy)")
    (size,) = usual_maps(layers)[:1]
    sizes = [size.read(layer) or 0.0 for layer in layers]
    norms.barh(places, sizes, height=0.7, color=theme.update)
    norms.set_xlim(0.0, 1.04 * max(*sizes, 1e-9))
    norms.locator_params(axis="x", nbins=4)
    set_title(norms, theme, size.title, "by base weight's size" if size is RELATIVE_SIZE else "base weight unknown")
    set_axis_labels(norms, theme, x="norm, % of base" if size is RELATIVE_SIZE else "norm")
    _label_kinds((heat, ranks, norms), layers, theme)


def _draw_heat(figure: FigureBase, axes: Axes, layers: Sequence[LearnedLayer], theme: Theme) -> None:
    import numpy as np

    rank = max(1, *(len(layer.singular_values) for layer in layers))
    shares = np.full((len(layers), rank), np.nan)
    for place, layer in enumerate(layers):
        if layer.largest > 0.0:
            shares[place, : len(layer.singular_values)] = np.divide(layer.singular_values, layer.largest)
    colors = ramp(theme).with_extremes(bad=theme.background)
    image = axes.imshow(shares, cmap=colors, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    step = max(1, math.ceil(rank / 8))
    axes.set_xticks(range(0, rank, step), [str(index + 1) for index in range(0, rank, step)])
    for spine in axes.spines.values():
        spine.set_visible(False)
    remark = f"of the updates of {wording.plural(len(layers), 'layer')}"
    set_title(axes, theme, "Singular values", remark)
    set_axis_labels(axes, theme, x="singular value, largest first")
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=40)
    bar.set_label("value / largest of its layer", fontsize=TICK_SIZE, color=theme.muted)
    bar.set_ticks([0.0, 0.5, 1.0])
    bar.ax.tick_params(colors=theme.muted, labelsize=TICK_SIZE, length=0)
    bar.outline.set_visible(False)


def _label_kinds(panels: Sequence[Axes], layers: Sequence[LearnedLayer], theme: Theme) -> None:
    """Name each group of layers of one kind at its middle and part the groups by a line."""
    starts = [place for place, layer in enumerate(layers) if place == 0 or layer.kind != layers[place - 1].kind]
    ends = [*starts[1:], len(layers)]
    for axes in panels:
        if len(starts) <= len(layers) // 2:
            for start in starts[1:]:
                axes.axhline(start - 0.5, color=theme.muted, linewidth=0.8)
        axes.set_ylim(len(layers) - 0.5, -0.5)
    shown = every_nth(len(starts))
    middles = [(starts[index] + ends[index] - 1) / 2.0 for index in shown]
    names = [_kind_label(layers[starts[index] : ends[index]]) for index in shown]
    panels[0].set_yticks(middles, names, parse_math=False, fontsize=TICK_SIZE if len(names) <= 24 else TICK_SIZE - 2)
    panels[0].tick_params(axis="y", labelcolor=theme.text)
    for axes in panels[1:]:
        axes.tick_params(axis="y", labelleft=False)


def _kind_label(group: Sequence[LearnedLayer]) -> str:
    name = group[0].kind
    short = name if len(name) <= 26 else f"…{name[-25:]}"
    first, last = group[0].block, group[-1].block
    if len(group) == 1 or first is None or last is None:
        return short if first is None else f"{short} {first}"
    return f"{short}\nblocks {first} to {last}" if len(group) > 2 else f"{short} {first}, {last}"
