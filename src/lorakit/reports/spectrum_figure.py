"""One picture of what is inside an adapter's updates: maps of the layers, and their singular values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.files import atomic_write
from lorakit.records import AdapterSimilarity, AdapterSpectrum
from lorakit.reports import wording
from lorakit.reports.layers_panel import (
    LayerMap,
    draw_bars,
    draw_curves,
    draw_maps,
    has_depth,
    heights,
    usual_maps,
)
from lorakit.reports.spectrum import LearnedLayer, Read, learned_layers, overlap_figure
from lorakit.reports.theme import LIGHT, Theme, new_figure, to_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 12.0
_COLUMNS = 3
_TALLEST = 40.0


def write_picture(found: AdapterSpectrum, path: str | os.PathLike[str]) -> None:
    """Draw the layers into a PNG file, whole or not at all.

    Raises:
        TrainingError: the disk is full.
    """
    content = layers_picture(found)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def layers_picture(found: AdapterSpectrum, theme: Theme = LIGHT) -> bytes:
    """Draw the layers as a PNG.

    Where the model has numbered blocks: maps of size, effective rank and energy; with a base the share inside its
    first directions and the amplification; with another adapter the likeness. Else a list with bars.
    """
    layers = learned_layers(found.layers)
    if not has_depth(layers):
        figure = _figure(found, theme, min(_TALLEST, 3.0 + 0.28 * len(layers)))
        draw_bars(figure.add_subfigure(figure.add_gridspec(1, 1)[0], facecolor=theme.background), layers, theme)
        return to_bytes(figure)
    maps = [*usual_maps(layers), *_maps(found, layers)]
    one_row, curves = heights(layers)
    above = one_row * -(-len(maps) // _COLUMNS)
    figure = _figure(found, theme, min(_TALLEST, 0.5 + above + curves))
    grid = figure.add_gridspec(2, 1, height_ratios=[above, curves], hspace=0.03)
    top, bottom = (figure.add_subfigure(cell, facecolor=theme.background) for cell in (grid[0], grid[1]))
    draw_maps(top, layers, maps, theme, _COLUMNS)
    draw_curves(bottom, layers, theme)
    return to_bytes(figure)


def _figure(found: AdapterSpectrum, theme: Theme, height: float) -> Figure:
    figure = new_figure(_WIDTH, height, theme)
    figure.suptitle(
        f"{wording.method_name(found.method)} in {wording.shortened(found.folder, 60)}: "
        f"{wording.plural(len({layer.path for layer in found.layers}), 'layer')}",
        x=0.016,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=theme.text,
        parse_math=False,
    )
    return figure


def _maps(found: AdapterSpectrum, layers: Sequence[LearnedLayer]) -> list[LayerMap]:
    """Return the maps that need the base's weights or another adapter."""
    maps = []
    if any(layer.overlap is not None for layer in layers):
        maps += [
            LayerMap("Inside the base's directions", "outputs and inputs, %", _inside_percent, wording.significant),
            LayerMap("Amplification", "norm over the base's there", overlap_figure("amplification"), "{:.1f}".format),
        ]
    if found.similarity is not None:
        remark = f"all of B, to {wording.shortened(found.similarity.other, 24)}"
        maps.append(LayerMap("Likeness", remark, _likeness(found.similarity), "{:.2f}".format))
    return maps


def _inside_percent(layer: LearnedLayer) -> float | None:
    return None if layer.overlap is None else 100.0 * layer.overlap.both


def _likeness(similarity: AdapterSimilarity) -> Read:
    known = {(layer.path, layer.expert): layer.at[-1].B for layer in similarity.layers if layer.at}
    return lambda layer: known.get((layer.path, layer.expert))
