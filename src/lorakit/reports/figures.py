"""Pictures of a run as bytes: each question on a page of its own, and one overview of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.records import Evaluation, LayerSpectrum, RunSummary
from lorakit.reports import comparison, panels, wording
from lorakit.reports.layers_panel import draw_spectrum, has_depth, heights
from lorakit.reports.panels import Metrics
from lorakit.reports.spectrum import learned_layers
from lorakit.reports.theme import LIGHT, ImageKind, Theme, new_figure, to_bytes

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase, SubFigure


def loss_curve(metrics: Metrics, kind: ImageKind = "png", theme: Theme = LIGHT, unit: str = "nats") -> bytes:
    """Draw training and held-out loss by optimizer step.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        kind: 'png' or 'svg'.
        theme: the colours.
        unit: unit of the loss, for the axis.
    """
    figure = new_figure(9.0, 4.6, theme)
    panels.draw_loss(figure, metrics, theme, unit)
    return to_bytes(figure, kind)


def confusion_matrix(
    evaluation: Evaluation, labels: Sequence[str], kind: ImageKind = "png", theme: Theme = LIGHT
) -> bytes:
    """Draw which class is taken for which; ``labels`` in logit order."""
    side = min(14.0, 3.4 + 0.5 * len(labels))
    figure = new_figure(side + 1.4, side, theme)
    panels.draw_confusion(figure, evaluation, labels, theme)
    return to_bytes(figure, kind)


def before_after_bars(summary: RunSummary, kind: ImageKind = "png", theme: Theme = LIGHT) -> bytes:
    """Draw F1 per class before and after; for tokens loss, perplexity and accuracy before and after."""
    rows = min(40, len(summary.after.classes))
    height = 1.7 + 0.42 * rows if comparison.is_classification(summary) else 3.6
    figure = new_figure(9.0, max(2.6, height), theme)
    panels.draw_scores(figure, summary, theme)
    return to_bytes(figure, kind)


def singular_values(spectra: Sequence[LayerSpectrum], kind: ImageKind = "png", theme: Theme = LIGHT) -> bytes:
    """Draw what each layer learned: size relative to the base weight, effective rank, energy, singular values."""
    layers = learned_layers(spectra)
    listed = min(16.0, max(4.2, 2.4 + 1.05 * math.sqrt(len(spectra))))
    figure = new_figure(10.0, min(16.0, sum(heights(layers))) if has_depth(layers) else listed, theme)
    draw_spectrum(figure, spectra, theme)
    return to_bytes(figure, kind)


def overview_picture(summary: RunSummary, metrics: Metrics, theme: Theme = LIGHT) -> bytes:
    """Draw one wide PNG, 1600 x 900, of the whole run: loss, scores, confusions and singular values."""
    figure = new_figure(16.0, 9.0, theme)
    steps = wording.plural(summary.num_steps, "step")
    figure.suptitle(
        f"{wording.method_name(summary.method)} on {wording.shortened(summary.model, 60)}: "
        f"{steps} in {wording.duration(summary.seconds)}",
        x=0.016,
        ha="left",
        fontsize=17,
        fontweight="bold",
        color=theme.text,
        parse_math=False,
    )
    left, right = _parts(figure, theme, 1, 2, (1.0, 1.12))
    if comparison.is_classification(summary):
        loss, scores = _parts(left, theme, 2, 1, (1.0, 1.05))
        confusion, learned = _parts(right, theme, 2, 1, (1.0, 1.05))
        panels.draw_confusion(confusion, summary.after, summary.labels, theme)
    else:
        loss, scores = _parts(left, theme, 2, 1, (1.25, 1.0))
        learned = right
    panels.draw_loss(loss, metrics, theme, loss_unit(summary))
    panels.draw_scores(scores, summary, theme)
    draw_spectrum(learned, summary.spectra, theme)
    return to_bytes(figure)


def _parts(
    parent: FigureBase, theme: Theme, rows: int, columns: int, ratios: tuple[float, float]
) -> tuple[SubFigure, SubFigure]:
    """Divide a figure in two, below each other or side by side."""
    heights, widths = (ratios, None) if rows == 2 else (None, ratios)
    grid = parent.add_gridspec(rows, columns, height_ratios=heights, width_ratios=widths, wspace=0.03, hspace=0.03)
    first, second = (parent.add_subfigure(cell, facecolor=theme.background) for cell in (grid[0], grid[1]))
    return first, second


def loss_unit(summary: RunSummary) -> str:
    """Return the unit of the losses of a run."""
    return "nats per row" if comparison.is_classification(summary) else "nats per token"
