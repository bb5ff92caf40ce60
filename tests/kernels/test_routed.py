"""The products of a routed batch: every way computes the same, and its derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorakit.kernels.cost_table import Problem, coefficients, predicted_us
from lorakit.kernels.routed import WAYS, Pairs
from lorakit.kernels.routed_product import add_products, add_trained, choose
from lorakit.kernels.segments import Segments

# Sums of some dozens of terms of order 1 in another order; bf16 keeps 8 bits, and h is rounded to them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15}
D_IN, D_OUT = 16, 24
RANKS, SCALES = (2, 8, 3), (2.0, 0.5, -1.5)
ROUTES = {
    "sorted": [0, 0, 1, 1, 1, 2],
    "sorted, one each": [0, 1, 2],
    "mixed": [2, 0, 1, 0, 2, 2],
    "mixed, with rows of none": [2, -1, 0, 1, 0, -1, 2, 2],
    "beside each other, with rows of none": [-1, 0, 0, 1, 2, 2, -1],
    "uneven": [1] * 9 + [0, 2, 1],
}
EVERY_WAY = [(way, torch.float32 if way == "grouped" else torch.float64) for way in WAYS]
ways = pytest.mark.parametrize("way", WAYS)
routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


class Inputs:
    """Factors, input and output of one routed product."""

    def __init__(self, codes: Sequence[int], dtype: torch.dtype, factors: torch.dtype | None = None) -> None:
        self.codes = codes
        generator = torch.Generator().manual_seed(0)
        self.A = [torch.randn(rank, D_IN, generator=generator).to(factors or dtype) for rank in RANKS]
        self.B = [torch.randn(D_OUT, rank, generator=generator).to(factors or dtype) for rank in RANKS]
        self.x = torch.randn(len(codes), D_IN, generator=generator).to(dtype)
        self.out = torch.randn(len(codes), D_OUT, generator=generator).to(dtype)
        self.segments = Segments(torch.tensor(codes), len(RANKS))

    def pairs(self) -> Pairs:
        return Pairs(self.A, self.B, SCALES, self.out.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.out, self.x, *self.A, *self.B]


def row_by_row(codes: Sequence[int], out: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
    """Compute each row by itself, in the words of the definition."""
    n, rows = len(RANKS), []
    for i, code in enumerate(codes):
        A, B = (None, None) if code < 0 else (factors[code].to(x.dtype), factors[n + code].to(x.dtype))
        rows.append(out[i] if A is None or B is None else out[i] + SCALES[code] * (B @ (A @ x[i])))
    return torch.stack(rows)


@ways
@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_adds_each_rows_own_product(way: str, route: list[int], dtype: torch.dtype) -> None:
    inputs = Inputs(route, dtype)
    expected = row_by_row(route, *[tensor.double() for tensor in inputs.tensors()])
    add_products(inputs.out, inputs.x, inputs.pairs(), inputs.segments, WAYS[way])
    bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()) / 10)
    torch.testing.assert_close(inputs.out.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("way", "dtype"), EVERY_WAY)
@routes
def test_every_way_has_the_definitions_derivatives(way: str, dtype: torch.dtype, route: list[int]) -> None:
    inputs = Inputs(route, dtype)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors()]
    expected = torch.autograd.grad(row_by_row(route, *tensors).sin().sum(), tensors)
    out, x, *factors = tensors
    own = add_trained(out * 1.0, x, factors[:3], factors[3:], SCALES, inputs.segments, WAYS[way])
    found = torch.autograd.grad(own.sin().sum(), tensors)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(other.abs().max())))


# torch's grouped product takes no float64: the test above holds its derivatives to the definition's in float32.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "grouped"])
@pytest.mark.parametrize("route", [ROUTES["sorted"], ROUTES["mixed, with rows of none"]], ids=["sorted", "mixed"])
def test_gradcheck(way: str, route: list[int]) -> None:
    inputs = Inputs(route, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors()]

    def product(out: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        return add_trained(out * 1.0, x, factors[:3], factors[3:], SCALES, inputs.segments, WAYS[way])

    assert torch.autograd.gradcheck(product, tensors)


@ways
def test_rows_of_no_group_keep_their_bits(way: str) -> None:
    inputs = Inputs([-1, 0, 1, -1, 2, 0], torch.float32)
    inputs.out[0], inputs.out[3] = -0.0, math.nan
    inputs.x[0], inputs.x[3] = math.inf, math.nan
    before = inputs.out.clone()
    add_products(inputs.out, inputs.x, inputs.pairs(), inputs.segments, WAYS[way])
    assert torch.equal(inputs.out[[0, 3]].view(torch.int32), before[[0, 3]].view(torch.int32))
    assert bool(torch.isfinite(inputs.out[[1, 2, 4, 5]]).all())


@ways
@pytest.mark.parametrize("broken", ["A", "B"])
def test_a_broken_adapter_breaks_no_other_rows(way: str, broken: str) -> None:
    inputs = Inputs([1, 0, 2, 0, 1, 2], torch.float32)
    (inputs.A if broken == "A" else inputs.B)[1][0, 0] = math.nan
    pairs = inputs.pairs()
    if not WAYS[way].takes(pairs, inputs.segments, False):
        assert way == "joined"  # the one whose products mix the groups refuses such factors
        return
    add_products(inputs.out, inputs.x, pairs, inputs.segments, WAYS[way])
    assert bool(torch.isfinite(inputs.out[[1, 2, 3, 5]]).all())
    assert not bool(torch.isfinite(inputs.out[[0, 4]]).all())


@ways
def test_a_row_whose_product_overflows_breaks_no_other_group(way: str) -> None:
    inputs = Inputs([1, 0, 2, 0, 1, 2], torch.float32)
    inputs.A[1] *= 1e30  # finite, but not times x
    inputs.x[0] = 1e30
    add_products(inputs.out, inputs.x, inputs.pairs(), inputs.segments, WAYS[way])
    assert bool(torch.isfinite(inputs.out[[1, 2, 3, 5]]).all())


def test_factors_of_another_dtype_get_gradients_of_their_own() -> None:
    inputs = Inputs(ROUTES["mixed"], torch.bfloat16, factors=torch.float32)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors()]
    out, x, *factors = tensors
    result = add_trained(out * 1.0, x, factors[:3], factors[3:], SCALES, inputs.segments)
    found = torch.autograd.grad(result.float().sum(), tensors)
    assert result.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 2 + [torch.float32] * 6


@pytest.mark.parametrize("way", ["runs", "loop", "grouped", "padded"])
def test_what_is_kept_for_the_backward_pass_is_the_input_and_narrow(way: str) -> None:
    inputs = Inputs(ROUTES["mixed"] * 8, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in inputs.tensors()]
    out, x, *factors = tensors
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        add_trained(out * 1.0, x, factors[:3], factors[3:], SCALES, inputs.segments, WAYS[way])
    own = {tensor.data_ptr() for tensor in tensors}
    beside = [tensor for tensor in kept if tensor.data_ptr() not in own]
    segments = inputs.segments
    rows = len(segments.counts) * max(segments.counts) if way == "padded" else len(inputs.codes)
    assert sum(tensor.numel() for tensor in beside) <= rows * 8  # times the largest rank


def test_a_gradient_that_is_one_number_everywhere_is_taken() -> None:
    inputs = Inputs(ROUTES["mixed"], torch.float32)
    x = inputs.x.requires_grad_()
    for way in WAYS.values():
        out = add_trained(inputs.out * 1.0, x, inputs.A, inputs.B, SCALES, inputs.segments, way)
        (found,) = torch.autograd.grad(out.sum(), x)  # an expanded tensor without strides
        assert bool(torch.isfinite(found).all())


def test_half_precision_sums_a_groups_gradient_once() -> None:
    inputs = Inputs([0, 1, 0, 1, 2], torch.bfloat16)
    assert not WAYS["runs"].takes(inputs.pairs(), inputs.segments, True)
    assert WAYS["runs"].takes(inputs.pairs(), inputs.segments, False)


def test_training_never_joins_factors_that_may_break() -> None:
    inputs = Inputs([0, 1, 2], torch.float32)
    assert choose(inputs.pairs(), inputs.segments, True).name != "joined"


def test_widths_that_a_grouped_product_cannot_take_are_left_to_others() -> None:
    pairs = Pairs([torch.randn(2, 6)], [torch.randn(5, 2)], [1.0], torch.float32)
    assert not WAYS["grouped"].takes(pairs, Segments(torch.tensor([0, 0]), 1), False)


# The table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_table_has_a_cost_for_every_way(device: str, dtype: str, trained: bool) -> None:
    costs = coefficients(device, dtype, trained)
    wanted = {name for name, way in WAYS.items() if not (trained and name == "joined")}
    assert wanted <= set(costs)
    assert all(value >= 0 for values in costs.values() for value in values)


@pytest.mark.parametrize("way", WAYS)
def test_more_rows_never_cost_less(way: str) -> None:
    costs = coefficients("cpu", "float32", False)[way]
    times = []
    for rows in (8, 64, 512):
        segments = Segments(torch.arange(rows) % 8, 8)
        pairs = Pairs([torch.empty(4, 64)] * 8, [torch.empty(64, 4)] * 8, [1.0] * 8, torch.float32)
        times.append(predicted_us(costs, Problem.of(pairs, segments), way))
    assert times == sorted(times)


def test_the_choice_is_the_cheapest_that_applies() -> None:
    inputs = Inputs(ROUTES["mixed"], torch.float32)
    pairs, costs = inputs.pairs(), coefficients("cpu", "float32", False)
    problem = Problem.of(pairs, inputs.segments)
    chosen = choose(pairs, inputs.segments, False)
    assert chosen.name == min(WAYS, key=lambda way: predicted_us(costs[way], problem, way))
    assert choose(pairs, inputs.segments, False) is chosen
