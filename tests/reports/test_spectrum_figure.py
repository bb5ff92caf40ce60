from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from lorakit.records import AdapterSimilarity, AdapterSpectrum, LayerSimilarity, LayerSpectrum
from lorakit.reports.layers_panel import has_depth, usual_maps
from lorakit.reports.spectrum import learned_layers
from lorakit.reports.spectrum_figure import layers_picture, write_picture
from lorakit.reports.theme import DARK, LIGHT, Theme

from .conftest import bert_like_spectra
from .test_spectrum_table import OVERLAP, similarity


def pixels(png: bytes) -> Any:
    from matplotlib import image

    return image.imread(BytesIO(png), format="png")


def size_of(spectrum: AdapterSpectrum, theme: Theme = LIGHT) -> tuple[int, int]:
    """Return height and width of a picture that is not empty."""
    picture = pixels(layers_picture(spectrum, theme))
    assert picture.std() > 0.02
    height, width = picture.shape[:2]
    return height, width


def spectrum_of(layers: tuple[LayerSpectrum, ...], **fields: Any) -> AdapterSpectrum:
    return AdapterSpectrum("runs/a", {"name": "lora"}, layers, **fields)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_model_with_blocks_is_drawn_as_maps(theme: Theme) -> None:
    assert size_of(spectrum_of(bert_like_spectra(12, 8)), theme)[1] == 1200


def test_a_base_and_another_adapter_add_a_row_of_maps() -> None:
    layers = tuple(replace(layer, overlap=OVERLAP) for layer in bert_like_spectra(6, 8))
    alike = AdapterSimilarity("runs/b", {}, (similarity(layers[0].path), LayerSimilarity(layers[1].path, ())))
    plain = size_of(spectrum_of(layers=tuple(bert_like_spectra(6, 8))))
    assert size_of(spectrum_of(layers, similarity=alike))[0] > plain[0] + 200


ODD = {
    "one layer": (LayerSpectrum("a", (1.0, 0.5), 2.0),),
    "zero": (LayerSpectrum("a", (0.0, 0.0), 3.0),),
    "zero in blocks": tuple(LayerSpectrum(f"h.{i}.up", (0.0, 0.0), 3.0) for i in range(4)),
    "no base": tuple(LayerSpectrum(f"h.{i}.up", (1.0, 0.5)) for i in range(4)),
    "some without a base": (
        LayerSpectrum("h.0.up", (1.0,), 2.0), LayerSpectrum("h.1.up", (1.0,)), LayerSpectrum("h.2.up", (1.0,))
    ),
    "other ranks": tuple(LayerSpectrum(f"h.{i}.up", (1.0,) * (1 + i)) for i in range(5)),
    "outside the blocks": (LayerSpectrum("head", (1.0,)), *(LayerSpectrum(f"h.{i}.up", (1.0, 0.5)) for i in range(4))),
    "a stack": tuple(LayerSpectrum(f"h.{i}.experts", (1.0, 0.5), 2.0, e) for i in range(4) for e in range(5)),
    "many layers without blocks": tuple(LayerSpectrum(f"layer_{i}_alone", (1.0, 0.3), 1.0) for i in range(90)),
    "many kinds": tuple(LayerSpectrum(f"h.{i}.kind_{k}", (1.0, 0.3), 1.0) for i in range(3) for k in range(60)),
    "odd names": tuple(LayerSpectrum(f"h.{i}.$x^{{<b>", (1.0, 0.3), 1.0) for i in range(4)),
}  # fmt: skip


@pytest.mark.parametrize("layers", ODD.values(), ids=ODD.keys())
def test_odd_layers_still_give_a_picture(layers: tuple[LayerSpectrum, ...]) -> None:
    height, width = size_of(spectrum_of(layers))
    assert 200 <= height <= 4000
    assert width == 1200


@pytest.mark.parametrize(("num_blocks", "deep"), [(2, False), (3, True)])
def test_maps_need_some_blocks(num_blocks: int, deep: bool) -> None:
    layers = learned_layers([LayerSpectrum(f"h.{i}.up", (1.0,)) for i in range(num_blocks)])
    assert has_depth(layers) is deep


def test_the_size_is_relative_where_the_base_is_known() -> None:
    known, unknown = ([LayerSpectrum("a", (3.0, 4.0), norm)] for norm in (50.0, None))
    values = [usual_maps(layers)[0].read(layers[0]) for layers in (learned_layers(known), learned_layers(unknown))]
    assert values == [pytest.approx(10.0), pytest.approx(5.0)]


def test_the_same_adapter_gives_the_same_bytes() -> None:
    found = spectrum_of(bert_like_spectra(3, 4))
    assert layers_picture(found) == layers_picture(found)


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    found = spectrum_of(bert_like_spectra(3, 4))
    write_picture(found, tmp_path / "new" / "layers.png")
    assert (tmp_path / "new" / "layers.png").read_bytes() == layers_picture(found)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["layers.png"]
