"""Pictures of a run as bytes: each question on a page of its own, and one overview of all; and each in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.records import Evaluation, LayerSpectrum, RunSummary
from lorakit.reports import comparison, panels, wording
from lorakit.reports.layers_panel import draw_quarter, draw_spectrum, has_depth, heights
from lorakit.reports.panels import Metrics
from lorakit.reports.spectrum import learned_layers
from lorakit.reports.theme import LIGHT, TICKS_AT_MOST, ImageKind, Theme, new_figure, to_bytes

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase, SubFigure


def loss_curve(
    metrics: Metrics,
    kind: ImageKind = "png",
    theme: Theme = LIGHT,
    unit: str = "nats",
    best_step: int | None = None,
) -> bytes:
    """Draw training and held-out loss by optimizer step.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        kind: 'png' or 'svg'.
        theme: the colours.
        unit: unit of the loss, for the axis.
        best_step: the evaluation to mark as the best; None marks none.
    """
    figure = new_figure(9.0, 4.6, theme)
    panels.draw_loss(figure, metrics, theme, unit, best_step)
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
        f"{wording.method_name(summary.method)} on {wording.model_name(summary.model)}: "
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
        draw_quarter(learned, summary.spectra, theme)
    else:
        loss, scores = _parts(left, theme, 2, 1, (1.25, 1.0))
        draw_spectrum(right, summary.spectra, theme)
    panels.draw_loss(loss, metrics, theme, loss_unit(summary), comparison.best_step(summary, metrics))
    panels.draw_scores(scores, summary, theme)
    return to_bytes(figure)


def _parts(
    parent: FigureBase, theme: Theme, rows: int, columns: int, ratios: tuple[float, float]
) -> tuple[SubFigure, SubFigure]:
    """Divide a figure in two, below each other or side by side."""
    heights, widths = (ratios, None) if rows == 2 else (None, ratios)
    grid = parent.add_gridspec(rows, columns, height_ratios=heights, width_ratios=widths, wspace=0.03, hspace=0.03)
    first, second = (parent.add_subfigure(cell, facecolor=theme.background) for cell in (grid[0], grid[1]))
    return first, second


def loss_words(summary: RunSummary, metrics: Metrics) -> str:
    """Say what the picture of the losses shows."""
    trained = [line["loss"] for line in metrics if line["kind"] == "train" and line["loss"] is not None]
    held = comparison.evaluations(metrics)
    if not trained and not held:
        return "Chart without lines: no steps were recorded."
    parts = []
    if trained:
        parts.append(
            f"the training loss, {wording.decimal(trained[0])} at the first of {wording.plural(len(trained), 'step')} "
            f"and {wording.decimal(trained[-1])} at the last"
        )
    if held:
        best = comparison.best_step(summary, metrics)
        marked = "" if best is None else f" (the best, at step {wording.count(best)}, is marked)"
        ends = [wording.decimal(measured.found.loss) for measured in (held[0], held[-1])]
        reach = f"{ends[0]} at the first and {ends[1]} at the last" if len(held) > 1 else ends[0]
        parts.append(f"the held-out loss at {wording.plural(len(held), 'evaluation')}{marked}, {reach}")
    if any(line["kind"] == "train" and line.get("lr") is not None for line in metrics):
        parts.append("and below them the learning rate")
    return f"Line chart by optimizer step: {'; '.join(parts)}."


def score_words(summary: RunSummary) -> str:
    """Say what the picture of the scores shows."""
    if not comparison.is_classification(summary):
        named = "; ".join(f"{row.name} {row.texts[0]} and {row.texts[-1]}" for row in comparison.measures(summary))
        return f"Bar charts of the base and the adapted model: {named}."
    rows = comparison.class_rows(summary)
    if not rows:
        return "Chart without bars: no scores per class were recorded."
    few = len(rows) <= TICKS_AT_MOST
    drawn = wording.plural(len(rows), "class", "es") if few else f"the {TICKS_AT_MOST} weakest of {len(rows)} classes"
    rose, fell = (sum(sign * row.change > 0 for row in rows) for sign in (1, -1))
    return (
        f"Bar chart of F1 before and after for {drawn}. Of all classes F1 rose in {rose} and fell in {fell}; "
        "the table has the figures."
    )


def confusion_words(summary: RunSummary) -> str:
    """Say what the picture of the confusions shows."""
    counts = summary.after.confusion
    right, rows = sum(counts[index][index] for index in range(len(counts))), sum(map(sum, counts))
    text = (
        f"Confusion matrix, truth down and prediction across, {wording.plural(len(counts), 'class', 'es')}: "
        f"{wording.count(right)} of {wording.plural(rows, 'held-out row')} are on its diagonal"
    )
    mistakes = comparison.confusions(summary.after, summary.labels, limit=1)
    if not mistakes:
        return f"{text}."
    truth, predicted, times = mistakes[0]
    return f"{text}; most often {truth} was taken for {predicted}, in {wording.plural(times, 'row')}."


def spectrum_words(spectra: Sequence[LayerSpectrum]) -> str:
    """Say what the picture of the layers shows."""
    layers = learned_layers(spectra)
    if not layers:
        return "Chart without layers: no singular values were recorded."
    shown = (
        "maps of the update's size, its effective rank and the energy kept at half the rank, by kind of layer and "
        "block, above curves of the singular values by kind"
        if has_depth(layers)
        else "the singular values, the effective rank and the size of the update, a line a layer"
    )
    return f"What {wording.plural(len(layers), 'layer')} learned: {shown}; the table has the figures."


def loss_unit(summary: RunSummary) -> str:
    """Return the unit of the losses of a run."""
    return "nats per row" if comparison.is_classification(summary) else "nats per token"
