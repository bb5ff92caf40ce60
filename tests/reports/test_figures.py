from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

import pytest

from lorakit.records import Evaluation, LayerSpectrum, RunSummary
from lorakit.reports.figures import (
    before_after_bars,
    confusion_matrix,
    confusion_words,
    loss_curve,
    loss_words,
    overview_picture,
    score_words,
    singular_values,
    spectrum_words,
)
from lorakit.reports.layers_panel import draw_quarter
from lorakit.reports.panels import draw_loss
from lorakit.reports.theme import DARK, LIGHT, new_figure

Run = tuple[RunSummary, list[dict[str, Any]]]


def pixels(png: bytes) -> Any:
    from matplotlib import image

    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(BytesIO(png), format="png")


def is_drawn(png: bytes, min_width: int = 400, max_width: int = 1700) -> bool:
    picture = pixels(png)
    height, width = picture.shape[:2]
    return bool(min_width <= width <= max_width and 200 <= height <= 1700 and picture.std() > 0.02)


def test_the_overview_is_a_wide_picture_of_1600_by_900(classification_run: Run) -> None:
    assert pixels(overview_picture(*classification_run)).shape[:2] == (900, 1600)


def test_the_overview_of_tokens_has_the_same_size(generation_run: Run) -> None:
    assert pixels(overview_picture(*generation_run)).shape[:2] == (900, 1600)


def test_the_loss_curve_is_drawn(classification_run: Run) -> None:
    assert is_drawn(loss_curve(classification_run[1]))


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"kind": "train", "step": 1, "loss": 2.0, "lr": 0.001}],
        [{"kind": "eval", "step": 1, "loss": 2.0}],
        [{"kind": "train", "step": step, "loss": loss, "lr": 0.0} for step, loss in ((1, float("nan")), (2, 1.0))],
    ],
    ids=["none", "one step", "only held-out", "not a number"],
)
def test_odd_metrics_still_give_a_picture(metrics: list[dict[str, Any]]) -> None:
    assert is_drawn(loss_curve(metrics))


def drawn_loss(metrics: list[dict[str, Any]], best_step: int | None = None) -> Any:
    """Return the axes of the losses as drawn."""
    figure = new_figure(9.0, 4.6, LIGHT)
    draw_loss(figure, metrics, LIGHT, best_step=best_step)
    figure.canvas.draw()
    return figure.axes[0]


def points_of(axes: Any, label: str) -> list[tuple[float, float]]:
    line = next(line for line in axes.lines if line.get_label().startswith(label))
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_every_evaluation_is_a_point_of_the_loss_figure(classification_run: Run) -> None:
    metrics = classification_run[1]
    expected = [(line["step"], line["loss"]) for line in metrics if line["kind"] == "eval"]
    assert len(expected) == 10
    assert points_of(drawn_loss(metrics), "held-out") == expected


def test_the_best_evaluation_is_marked_where_it_lies(classification_run: Run) -> None:
    metrics = classification_run[1]
    loss = next(line["loss"] for line in metrics if line["kind"] == "eval" and line["step"] == 60)
    assert points_of(drawn_loss(metrics, 60), "best, step 60") == [(60, loss)]


def test_the_axis_of_the_loss_fits_the_losses() -> None:
    metrics = [{"kind": "train", "step": step, "loss": 7.0 - 0.01 * step, "lr": 0.1} for step in range(1, 21)]
    low, high = drawn_loss(metrics).get_ylim()
    assert 6.7 < low < 6.8 < 6.99 < high < 7.1


def test_the_legend_covers_no_line(classification_run: Run) -> None:
    axes = drawn_loss(classification_run[1], 60)
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1


def test_the_legend_keeps_clear_of_the_title_in_half_an_overview(classification_run: Run) -> None:
    metrics = [{**line, "step": 1000 * line["step"]} for line in classification_run[1]]
    figure = new_figure(7.5, 4.5, LIGHT)
    draw_loss(figure, metrics, LIGHT, best_step=60_000)
    figure.canvas.draw()
    axes: Any = figure.axes[0]
    title = next(text for text in axes.texts + axes.get_children() if getattr(text, "get_text", str)() == "Loss")
    assert axes.get_legend().get_window_extent().x0 > title.get_window_extent().x1


def test_the_words_for_the_losses_have_the_drawn_figures(classification_run: Run) -> None:
    summary, metrics = classification_run
    trained = [f"{line['loss']:.3f}" for line in metrics if line["kind"] == "train"]
    words = loss_words(summary, metrics)
    assert f"{trained[0]} at the first of 150 steps and {trained[-1]} at the last" in words
    assert "10 evaluations (the best, at step 150, is marked)" in words


def test_the_words_for_losses_name_no_line_that_is_missing(classification_run: Run) -> None:
    words = loss_words(classification_run[0], [{"kind": "eval", "step": 1, "loss": 2.0}])
    assert "held-out loss at 1 evaluation" in words
    assert "training loss" not in words
    assert "learning rate" not in words


def test_the_words_for_scores_count_the_classes_that_rose(classification_run: Run) -> None:
    summary = classification_run[0]
    turned = replace(summary, before=summary.after, after=summary.before)
    assert "8 classes. Of all classes F1 rose in 8 and fell in 0" in score_words(summary)
    assert "rose in 0 and fell in 8" in score_words(turned)


def test_the_words_for_tokens_have_the_figures_of_the_bars(generation_run: Run) -> None:
    assert "loss (nats/token) 3.532 and 1.301; perplexity 34.2 and 3.67" in score_words(generation_run[0])


def test_the_words_for_confusions_name_the_most_frequent_mistake(classification_run: Run) -> None:
    found = replace(classification_run[0].after, confusion=((5, 1), (3, 4)))
    words = confusion_words(replace(classification_run[0], labels=("cat", "dog"), after=found))
    assert "2 classes: 9 of 13 held-out rows are on its diagonal" in words
    assert "most often dog was taken for cat, in 3 rows" in words


@pytest.mark.parametrize(("num_layers", "shown"), [(1, "a line a layer"), (6, "maps of")])
def test_the_words_for_layers_name_what_is_drawn(num_layers: int, shown: str) -> None:
    spectra = [LayerSpectrum(f"model.layers.{i}.mlp.up", (1.0, 0.5, 0.1), 20.0) for i in range(num_layers)]
    assert shown in spectrum_words(spectra)


@pytest.mark.parametrize("num_labels", [2, 8, 77])
def test_a_confusion_matrix_of_any_size_is_drawn(num_labels: int) -> None:
    confusion = tuple(tuple(9 if i == j else 1 for j in range(num_labels)) for i in range(num_labels))
    evaluation = Evaluation(0.3, 10 * num_labels, confusion=confusion)
    assert is_drawn(confusion_matrix(evaluation, [f"label {i}" for i in range(num_labels)]))


@pytest.mark.parametrize("label", ["$100^{", "<script>", "日本語", "a\nb\x00c", "\\frac{1}", "x" * 300, ""])
def test_any_label_can_be_drawn(label: str, classification_run: Run) -> None:
    summary = classification_run[0]
    labels = (label, *summary.labels[1:])
    scores = (replace(summary.after.classes[0], label=label), *summary.after.classes[1:])
    assert is_drawn(confusion_matrix(summary.after, labels))
    assert is_drawn(before_after_bars(replace(summary, after=replace(summary.after, classes=scores))))


@pytest.mark.parametrize("num_layers", [1, 6, 36, 224])
def test_the_spectrum_of_any_number_of_layers_is_drawn(num_layers: int) -> None:
    spectra = [LayerSpectrum(f"model.layers.{i}.mlp.up", (1.0, 0.5, 0.1), 20.0) for i in range(num_layers)]
    assert is_drawn(singular_values(spectra))


@pytest.mark.parametrize(
    "spectra",
    [
        [],
        [LayerSpectrum("a", (0.0, 0.0), 3.0)],
        [LayerSpectrum("a", (1.0,)), LayerSpectrum("b", (1.0, 0.5, 0.2, 0.1))],
        [LayerSpectrum(f"layer_{i}_without_number", (1.0, 0.3), 1.0) for i in range(90)],
    ],
    ids=["none", "zero update", "unequal ranks", "no blocks"],
)
def test_odd_spectra_still_give_a_picture(spectra: list[LayerSpectrum]) -> None:
    assert is_drawn(singular_values(spectra))


def test_scores_are_drawn_for_both_kinds_of_task(classification_run: Run, generation_run: Run) -> None:
    assert is_drawn(before_after_bars(classification_run[0]))
    assert is_drawn(before_after_bars(generation_run[0]))


def test_the_same_records_give_the_same_bytes(classification_run: Run) -> None:
    metrics = classification_run[1]
    assert loss_curve(metrics) == loss_curve(metrics)
    assert loss_curve(metrics, "svg") == loss_curve(metrics, "svg")


def test_an_svg_is_well_formed_and_carries_its_text(classification_run: Run) -> None:
    summary = classification_run[0]
    root = ElementTree.fromstring(before_after_bars(summary, "svg"))
    words = "".join(root.itertext())
    assert all(label in words for label in summary.labels)


def test_dark_colours_give_a_dark_picture(classification_run: Run) -> None:
    light, dark = (pixels(loss_curve(classification_run[1], "png", theme)) for theme in (LIGHT, DARK))
    assert dark[..., :3].mean() < 0.3 < 0.7 < light[..., :3].mean()


def test_pictures_leave_no_global_figure(classification_run: Run) -> None:
    loss_curve(classification_run[1])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("height", [2.6, 4.3, 9.0])
@pytest.mark.parametrize("num_kinds", [7, 20, 38])
def test_the_names_of_the_maps_rows_never_touch(height: float, num_kinds: int) -> None:
    spectra = tuple(
        LayerSpectrum(f"blocks.{block}.part{kind}.dense", (1.0, 0.5), base_norm=10.0)
        for block in range(4)
        for kind in range(num_kinds)
    )
    figure = new_figure(8.0, height, LIGHT)
    draw_quarter(figure, spectra, LIGHT)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels() if label.get_text()]
    tops = sorted(((box.y0, box.y1) for box in boxes), key=lambda box: box[0])
    assert len(tops) > 1
    assert [pair for pair in itertools.pairwise(tops) if pair[0][1] > pair[1][0]] == []
