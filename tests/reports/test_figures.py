from __future__ import annotations

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
    loss_curve,
    overview_picture,
    singular_values,
)
from lorakit.reports.theme import DARK, LIGHT

Run = tuple[RunSummary, list[dict[str, Any]]]


def pixels(png: bytes) -> Any:
    from matplotlib import image

    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return image.imread(BytesIO(png), format="png")


def is_drawn(png: bytes, min_width: int = 400, max_width: int = 1700) -> bool:
    picture = pixels(png)
    height, width = picture.shape[:2]
    return min_width <= width <= max_width and 200 <= height <= 1700 and picture.std() > 0.02


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
