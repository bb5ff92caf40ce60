"""The drawings of losses, mistakes and scores, each onto a figure or a part of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.records import Evaluation, RunSummary
from lorakit.reports import comparison, wording
from lorakit.reports.theme import (
    LABEL_SIZE,
    TICK_SIZE,
    TICKS_AT_MOST,
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

Metrics = Sequence[Mapping[str, Any]]

_CELLS_WITH_NUMBERS = 20


def draw_loss(
    figure: FigureBase, metrics: Metrics, theme: Theme, unit: str = "nats", best_step: int | None = None
) -> None:
    """Draw training loss (raw and smoothed), every held-out loss, and the learning rate below.

    Args:
        figure: what to draw on.
        metrics: the lines of ``metrics.jsonl``.
        theme: the colours.
        unit: unit of the loss, for the axis.
        best_step: the evaluation to mark as the best; None marks none.
    """
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    steps, losses = _series(metrics, "train", "loss")
    eval_steps, eval_losses = _series(metrics, "eval", "loss")
    for axes in (top, bottom):
        style_axes(axes, theme, grid="both")
    if steps:
        raw_marker = "o" if len(steps) == 1 else ""
        top.plot(steps, losses, color=theme.adapted, linewidth=0.9, alpha=0.35, marker=raw_marker)
        top.plot(steps, _smoothed(losses), color=theme.adapted, linewidth=2.2, label="training, smoothed")
    if eval_steps:
        top.plot(
            eval_steps,
            eval_losses,
            color=theme.validation,
            linewidth=1.8,
            marker="o",
            markersize=5.5,
            markeredgecolor=theme.background,
            label="held-out",
        )
    if best_step in eval_steps:
        _mark_best(top, best_step, eval_losses[eval_steps.index(best_step)], theme)
    if steps or eval_steps:
        _legend_above(top, theme)
    else:
        say_nothing_here(top, theme, "no steps recorded")
    set_title(top, theme, "Loss")
    set_axis_labels(top, theme, y=f"loss ({unit})")
    bottom.plot(*_series(metrics, "train", "lr"), color=theme.muted, linewidth=1.6)
    bottom.set_ylim(bottom=0.0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    bottom.yaxis.get_offset_text().set(color=theme.muted, fontsize=TICK_SIZE - 1)
    bottom.locator_params(axis="y", nbins=2)
    bottom.locator_params(axis="x", integer=True)
    set_axis_labels(bottom, theme, x="optimizer step", y="learning\nrate")
    figure.align_ylabels([top, bottom])


def _mark_best(axes: Axes, step: int, loss: float, theme: Theme) -> None:
    axes.plot(
        [step],
        [loss],
        linestyle="none",
        marker="o",
        markersize=12.0,
        markerfacecolor="none",
        markeredgecolor=theme.text,
        markeredgewidth=1.6,
        label=f"best, step {wording.count(step)}",
    )


def _legend_above(axes: Axes, theme: Theme) -> None:
    """Write the legend beside the title, where no line runs."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
        ncols=3,
        columnspacing=1.2,
        frameon=False,
        fontsize=TICK_SIZE + 0.5,
        labelcolor=theme.text,
    )


def _series(metrics: Metrics, kind: str, name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one kind of line, without values that are missing or not finite."""
    pairs = [
        (float(line["step"]), float(line[name]))
        for line in metrics
        if line.get("kind") == kind and line.get(name) is not None and math.isfinite(line[name])
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean over a window of about a tenth of the run, centred so that it does not lag behind."""
    half = max(0, min(len(values) // 20, 50))
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def draw_confusion(figure: FigureBase, evaluation: Evaluation, labels: Sequence[str], theme: Theme) -> None:
    """Draw counts by truth (rows) and prediction (columns), coloured by the share of the true class."""
    axes = figure.subplots()
    style_axes(axes, theme)
    set_title(
        axes,
        theme,
        "Which class is taken for which",
        "rows of held-out data; colour: share of the true class",
    )
    if not evaluation.confusion:
        say_nothing_here(axes, theme, "no confusion matrix recorded")
        return
    shares = [[cell / max(1, sum(row)) for cell in row] for row in evaluation.confusion]
    image = axes.imshow(shares, cmap=ramp(theme), vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(labels) <= _CELLS_WITH_NUMBERS:
        _write_counts(axes, evaluation, shares, theme)
        edges = [index + 0.5 for index in range(len(labels) - 1)]
        axes.hlines(edges, -0.5, len(labels) - 0.5, color=theme.background, linewidth=1.5)
        axes.vlines(edges, -0.5, len(labels) - 0.5, color=theme.background, linewidth=1.5)
    shown = every_nth(len(labels))
    names = [drawn_label(labels[index], 20) for index in shown]
    size = TICK_SIZE if len(labels) <= 24 else TICK_SIZE - 2
    axes.set_xticks(shown, names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False, fontsize=size)
    axes.set_yticks(shown, names, parse_math=False, fontsize=size)
    set_axis_labels(axes, theme, x="predicted", y="truth")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0.0, 0.5, 1.0])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.ax.tick_params(colors=theme.muted, labelsize=TICK_SIZE, length=0)
    bar.outline.set_visible(False)


def _write_counts(axes: Axes, evaluation: Evaluation, shares: Sequence[Sequence[float]], theme: Theme) -> None:
    for truth, row in enumerate(evaluation.confusion):
        for predicted, rows in enumerate(row):
            if rows:
                color = theme.background if shares[truth][predicted] > 0.55 else theme.text
                weight = "bold" if truth == predicted else "normal"
                size = LABEL_SIZE if len(evaluation.confusion) <= 12 else TICK_SIZE - 2
                axes.text(
                    predicted,
                    truth,
                    str(rows),
                    ha="center",
                    va="center",
                    color=color,
                    weight=weight,
                    fontsize=size,
                )


def draw_scores(figure: FigureBase, summary: RunSummary, theme: Theme) -> None:
    """Draw F1 of every class before and after; for tokens loss, perplexity and accuracy before and after."""
    if comparison.is_classification(summary):
        _draw_class_scores(figure, summary, theme)
    else:
        _draw_token_scores(figure, summary, theme)


def _draw_class_scores(figure: FigureBase, summary: RunSummary, theme: Theme) -> None:
    axes = figure.subplots()
    style_axes(axes, theme, grid="x")
    rows = comparison.class_rows(summary)
    remark = "0 = never right, 1 = always right"
    if len(rows) > TICKS_AT_MOST:
        remark = f"the {TICKS_AT_MOST} weakest of {len(rows)} classes"
        rows = sorted(rows, key=lambda row: row.after)[:TICKS_AT_MOST]
    set_title(axes, theme, "F1 per class, before and after", remark)
    if not rows:
        say_nothing_here(axes, theme, "no scores per class recorded")
        return
    places = list(range(len(rows)))
    before, after = [row.before for row in rows], [row.after for row in rows]
    axes.barh([place - 0.2 for place in places], before, height=0.34, color=theme.base, label="before")
    axes.barh([place + 0.2 for place in places], after, height=0.34, color=theme.adapted, label="adapted")
    small = TICK_SIZE if len(rows) <= 24 else TICK_SIZE - 2
    for place, row in zip(places, rows, strict=True):
        for value, offset, color in ((row.before, -0.2, theme.muted), (row.after, 0.2, theme.text)):
            axes.text(value + 0.012, place + offset, f"{value:.2f}", va="center", fontsize=small - 1, color=color)
    axes.set_yticks(places, [drawn_label(row.label) for row in rows], parse_math=False, fontsize=small)
    axes.tick_params(axis="y", labelcolor=theme.text)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.12)
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axes.spines["bottom"].set_visible(False)
    set_axis_labels(axes, theme, x="F1 (harmonic mean of precision and recall)")
    _legend_above(axes, theme)


def _draw_token_scores(figure: FigureBase, summary: RunSummary, theme: Theme) -> None:
    before, after = summary.before, summary.after
    bars = [
        ("Loss", "nats per token, lower is better", before.loss, after.loss, wording.decimal),
        (
            "Perplexity",
            "lower is better",
            comparison.perplexity(before),
            comparison.perplexity(after),
            wording.significant,
        ),
        ("Token accuracy", "higher is better", before.accuracy, after.accuracy, wording.percent),
    ]
    known = [bar for bar in bars if bar[2] is not None and bar[3] is not None]
    panels = figure.subplots(1, len(known), squeeze=False)[0]
    for axes, (title, remark, was, now, write) in zip(panels, known, strict=True):
        style_axes(axes, theme)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        set_title(axes, theme, title, remark)
        values = [value if value is not None and math.isfinite(value) else 0.0 for value in (was, now)]
        axes.bar([0, 1], values, width=0.58, color=[theme.base, theme.adapted])
        for place, (value, height) in enumerate(zip((was, now), values, strict=True)):
            axes.annotate(
                write(value),
                (place, height),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=LABEL_SIZE,
                color=theme.text,
                weight="bold",
            )
        axes.set_xticks([0, 1], ["base", "adapted"])
        axes.tick_params(axis="x", labelcolor=theme.text, labelsize=LABEL_SIZE)
        axes.set_ylim(0.0, 1.15 * max(*values, 1e-9))
        axes.set_xlim(-0.6, 1.6)
