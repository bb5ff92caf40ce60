from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from lorakit.records import (
    AdapterSimilarity,
    AdapterSpectrum,
    BaseOverlap,
    LayerSimilarity,
    LayerSpectrum,
    SimilarityAt,
)
from lorakit.reports.spectrum_table import shown_ranks, spectrum_tables

from .conftest import bert_like_spectra

OVERLAP = BaseOverlap(8, 0.31, 0.22, 0.0417, 0.01, 0.02, 0.0002, 0.5, 0.3, 2.0, 12.34, 56.7)


def shown(found: AdapterSpectrum, top: int | None = 5, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO(), highlight=False)
    console.print(spectrum_tables(found, top))
    return console.export_text()


def spectrum_of(*layers: LayerSpectrum, **fields: object) -> AdapterSpectrum:
    return replace(AdapterSpectrum("runs/a", {"name": "lora", "rank": 8}, layers), **fields)  # type: ignore[arg-type]


@pytest.fixture
def bert() -> AdapterSpectrum:
    """Six blocks of six kinds of layers with long paths, with a base."""
    layers = (replace(layer, path=f"bert.{layer.path}", overlap=OVERLAP) for layer in bert_like_spectra(6, 8))
    return spectrum_of(*layers, base="base")


def similarity(path: str, expert: int | None = None) -> LayerSimilarity:
    at = (SimilarityAt(1, 1, 0.11, 0.22, 0.3, 0.4, 0.01, 0.02), SimilarityAt(8, 8, 0.51, 0.62, 0.51, 0.62, 0.05, 0.06))
    return LayerSimilarity(path, at, expert)


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_cut(bert: AdapterSpectrum, width: int) -> None:
    text = shown(bert, None, width)
    assert max(len(line) for line in text.splitlines()) <= width
    cut = [line for line in text.splitlines() if line.rstrip().endswith("…")]
    assert cut == []


def test_what_all_paths_begin_with_is_said_once(bert: AdapterSpectrum) -> None:
    text = shown(bert, None)
    assert text.count("bert.encoder.layer") == 1
    assert "All 36 layers, below bert.encoder.layer" in text


def test_each_kind_of_layer_is_one_line(bert: AdapterSpectrum) -> None:
    sizes, _, _ = shown(bert, 0).partition("Energy kept")
    assert [line.split()[:2] for line in sizes.splitlines() if "attention" in line] == [
        ["attention.self.query", "6"],
        ["attention.self.key", "6"],
        ["attention.self.value", "6"],
        ["attention.output.dense", "6"],
    ]


@pytest.mark.parametrize(("top", "rows"), [(0, 0), (3, 3), (None, 36)])
def test_as_many_layers_are_listed_as_asked(bert: AdapterSpectrum, top: int | None, rows: int) -> None:
    listed = [line for line in shown(bert, top).splitlines() if "12.3 x" in line and " of 8" in line]
    assert len(listed) == rows


def test_the_shares_and_what_chance_gives_stand_together(bert: AdapterSpectrum) -> None:
    lines = shown(bert, 0).splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("intermediate.dense") and "4.17 %" in line)
    assert lines[place].split() == ["intermediate.dense", "31.0", "%", "22.0", "%", "4.17", "%", "12.3", "x"]
    assert lines[place + 1].split() == ["by", "chance", "1.00", "%", "2.00", "%", "0.02", "%", "56.7", "x"]


def test_without_a_base_no_column_speaks_of_it() -> None:
    text = shown(spectrum_of(LayerSpectrum("a.up", (2.0, 1.0)), LayerSpectrum("b.up", (1.0, 0.5))))
    assert "base" not in text
    assert "Largest update a.up (2.24), smallest b.up (1.12)." in text


def test_a_stack_is_one_line_with_median_and_range() -> None:
    layers = [LayerSpectrum("h.0.experts.up", (float(1 + i),), 10.0, i) for i in range(3)]
    layers += [LayerSpectrum("h.1.experts.up", (float(4 + i),), 10.0, i) for i in range(3)]
    text = shown(spectrum_of(*layers))
    assert ["experts.up", "2", "x", "3"] in [line.split()[:4] for line in text.splitlines()]
    assert [line.split()[0] for line in text.splitlines() if " of 1 " in line] == ["1.experts.up", "0.experts.up"]
    assert "50.0 (40.0..60.0)" in text


def test_an_update_that_is_zero_is_shown() -> None:
    text = shown(spectrum_of(LayerSpectrum("a.up", (0.0, 0.0), 3.0), LayerSpectrum("b.up", (1.0, 1.0), 3.0)))
    assert "a.up" in text
    assert "0.0 of 2" in text


def test_the_likeness_names_what_only_one_adapter_has() -> None:
    found = AdapterSimilarity("runs/b", {"name": "lora"}, (similarity("h.0.up"),), ("h.0.down",), ())
    text = shown(spectrum_of(LayerSpectrum("h.0.up", (1.0,)), LayerSpectrum("h.0.down", (1.0,)), similarity=found))
    assert "Likeness to runs/b" in text
    assert ["up", "1", "0.110", "0.510", "0.220", "0.620"] in [line.split() for line in text.splitlines()]
    assert "1 layer only here: h.0.down" in text
    assert "only there" not in text


@pytest.mark.parametrize(
    ("rank", "ranks"), [(1, []), (8, [1, 2, 4]), (64, [1, 2, 4, 8, 16, 32]), (256, [2, 8, 32, 128])]
)
def test_the_ranks_shown_fit_a_line(rank: int, ranks: list[int]) -> None:
    assert shown_ranks(rank) == ranks


@pytest.mark.parametrize("path", ["x[bold]y.up", "[/]", "a" * 200])
def test_a_path_is_text_and_never_markup(path: str) -> None:
    text = shown(spectrum_of(LayerSpectrum(path, (1.0,)), LayerSpectrum("b", (0.5,))), None)
    assert path in text.replace("\n", "").replace(" ", "") or path[:60] in text


def test_nothing_in_a_path_steers_the_terminal() -> None:
    assert "\x1b" not in shown(spectrum_of(LayerSpectrum("a\x1b[2J.up", (1.0,)), LayerSpectrum("b", (0.5,))))


def test_an_adapter_of_one_layer_has_no_extremes() -> None:
    assert "smallest" not in shown(spectrum_of(LayerSpectrum("a.up", (1.0,))))
