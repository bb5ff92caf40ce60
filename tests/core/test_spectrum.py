"""Singular values of updates against dense ones, without ever making a dense matrix."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.adapters.spectrum import singular_values, spectra
from lorakit.training.memory import peak_bytes

from .models import KINDS, OneLayer, fill_with_noise, method_named, one_layer

# fp32, relative to the largest singular value.
TOLERANCE = 1e-5


def dense_values(delta: Tensor, count: int) -> Tensor:
    values: Tensor = torch.linalg.svdvals(delta.double())
    return values[:count].float()


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 24, 5), (24, 40, 5), (6, 50, 6), (50, 6, 6), (8, 8, 1)])
def test_values_are_those_of_the_dense_product(d_out: int, d_in: int, rank: int) -> None:
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    expected = dense_values(B @ A, rank)
    torch.testing.assert_close(singular_values(A, B), expected, rtol=0, atol=TOLERANCE * float(expected[0]))


def test_there_are_no_more_values_than_the_smaller_side() -> None:
    A, B = torch.randn(7, 4), torch.randn(30, 7)
    expected = dense_values(B @ A, 4)
    torch.testing.assert_close(singular_values(A, B), expected, rtol=0, atol=TOLERANCE * float(expected[0]))


def test_an_update_that_is_zero_has_zero_values() -> None:
    assert singular_values(torch.randn(3, 10), torch.zeros(8, 3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_layers_values_are_those_of_its_update(kind: str) -> None:
    model = one_layer(kind)
    handle = attach(model, method_named("lora"), targets=["layer"])
    fill_with_noise(handle)
    (found,) = spectra(handle)
    expected = dense_values(handle.delta("layer"), len(found.singular_values))

    assert found.path == "layer"
    torch.testing.assert_close(torch.tensor(found.singular_values), expected, rtol=0, atol=1e-5 * float(expected[0]))
    assert found.base_norm == pytest.approx(float(model.layer.get_parameter("weight").norm()), rel=1e-5)


def test_the_scale_is_in_the_values() -> None:
    def values(alpha: float) -> tuple[float, ...]:
        handle = attach(OneLayer(nn.Linear(6, 10)), method_named("lora", alpha=alpha), targets=["layer"], seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in handle.parameters().values():
                parameter.normal_(generator=generator)
        return spectra(handle)[0].singular_values

    assert values(6.0) == pytest.approx([2 * value for value in values(3.0)])


def test_no_dense_matrix_is_made() -> None:
    width, rank = 1024, 8
    A, B = torch.randn(rank, width), torch.randn(width, rank)
    assert peak_bytes(lambda: singular_values(A, B), torch.device("cpu")) < 4 * width * width / 8


def test_the_spectra_of_a_model_make_no_dense_matrix() -> None:
    width = 512
    handle = attach(OneLayer(nn.Linear(width, width)), method_named("lora"), targets=["layer"])
    assert peak_bytes(lambda: spectra(handle), torch.device("cpu")) < 4 * width * width / 8


def test_all_layers_of_a_model_of_seven_billion_take_seconds() -> None:
    num_layers, width, rank = 224, 4096, 8
    A, B = torch.randn(rank, width), torch.randn(width, rank)
    start = time.perf_counter()
    for _ in range(num_layers):
        singular_values(A, B)
    assert time.perf_counter() - start < 20.0
