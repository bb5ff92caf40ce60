"""The drawing of what each layer learned, readable for a handful of layers and for hundreds.

Layers of one kind stand together, named once, so that a pattern over the depth of the model can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.records import LayerSpectrum
from lorakit.reports import wording
from lorakit.reports.spectrum import LearnedLayer, learned_layers
from lorakit.reports.theme import (
    TICK_SIZE,
    Theme,
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


def draw_spectrum(figure: FigureBase, spectra: Sequence[LayerSpectrum], theme: Theme) -> None:
    """Draw every layer's singular values over its largest, its effective rank and its relative norm."""
    layers = learned_layers(spectra)
    if not layers:
        axes = figure.subplots()
        style_axes(axes, theme)
        set_title(axes, theme, "Singular values")
        say_nothing_here(axes, theme, "no singular values recorded")
        return
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
    set_title(norms, theme, "Update size", "by base weight's size")
    sizes = [100.0 * layer.relative_norm if layer.relative_norm is not None else 0.0 for layer in layers]
    norms.barh(places, sizes, height=0.7, color=theme.update)
    norms.set_xlim(0.0, 1.04 * max(*sizes, 1e-9))
    norms.locator_params(axis="x", nbins=4)
    set_axis_labels(norms, theme, x="norm, % of base")
    if not any(sizes):
        norms.set_xticks([])
        say_nothing_here(norms, theme, "not\nrecorded")
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
