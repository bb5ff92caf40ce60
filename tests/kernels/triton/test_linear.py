"""The fused adapted linear layer against float64, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError, ShapeError
from lorakit.kernels.triton import masks
from lorakit.kernels.triton.launch import Tiles
from lorakit.kernels.triton.linear import Adapted, adapted_linear

# Norm of the difference over norm of the reference: a few roundings of the dtype's unit, the reference having rounded
# factors too. The interpreter cuts bf16 off where a GPU rounds it, which is twice the error, always to one side.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Several tiles on every axis of shapes that the interpreter can bear, and two splits of every sum.
TILES = Tiles(rows=32, columns=32, depth=32, ranks=16, programs=6)
SCALE = 1.5  # alpha != rank


@dataclass
class Case:
    """Layers that read one x, of odd sizes; not one side is a multiple of a tile."""

    M: int = 37
    K: int = 40
    d_outs: tuple[int, ...] = (53,)
    ranks: tuple[int, ...] = (5,)
    p: float = 0.0
    dtype: torch.dtype = torch.float32
    factors: torch.dtype = torch.float32
    bias: bool = True
    fused: bool = False


CASES = {
    "several layers, dropout": Case(d_outs=(20, 33), ranks=(5, 18), p=0.3),
    "one kernel": Case(fused=True),
    "one row, no bias": Case(M=1, K=7, d_outs=(3,), ranks=(1,), bias=False),
    "bf16": Case(M=17, p=0.3, dtype=torch.bfloat16),
}
# More of the same: the interpreter takes seconds for each.
MORE = {
    "plain": Case(),
    "one kernel, several layers": Case(d_outs=(20, 33), ranks=(5, 2), fused=True, p=0.2),
    "three layers": Case(d_outs=(20, 33, 16), ranks=(5, 1, 20), p=0.3),
    "several blocks of ranks": Case(d_outs=(20,), ranks=(64,), p=0.3),
    "bf16, one kernel": Case(dtype=torch.bfloat16, fused=True),
    "bf16 factors": Case(dtype=torch.bfloat16, factors=torch.bfloat16),
    "fp16": Case(p=0.3, dtype=torch.float16),
}
SLOW = [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()]


def layers_of(case: Case, device: torch.device) -> tuple[Tensor, list[Adapted]]:
    """Draw x and the layers."""

    def draw(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*size, dtype=torch.float64) / size[-1] ** 0.5).to(device, dtype)

    x = torch.randn(case.M, case.K, dtype=torch.float64).to(device, case.dtype).requires_grad_()
    layers = []
    for d_out, rank in zip(case.d_outs, case.ranks, strict=True):
        A, B = draw(rank, case.K, dtype=case.factors), draw(d_out, rank, dtype=case.factors)
        bias = draw(d_out) if case.bias else None
        layers.append(Adapted(draw(d_out, case.K), bias, A.requires_grad_(), B.requires_grad_(), SCALE))
    return x, layers


def reference(case: Case, x: Tensor, layers: list[Adapted], seed: Tensor, gys: list[Tensor]) -> dict[str, Tensor]:
    """Return outputs and gradients in float64, the factors rounded to x's dtype, with the same mask."""
    x = x.detach().double().requires_grad_()
    dropped = x * masks.keep_mask(seed, case.M, case.K, case.p) * masks.gain(case.p) if case.p else x
    found: dict[str, Tensor] = {}
    for index, (layer, gy) in enumerate(zip(layers, gys, strict=True)):
        A, B = (f.detach().to(case.dtype).double().requires_grad_() for f in (layer.A, layer.B))
        y = x @ layer.W.double().t() + SCALE * (dropped @ A.t()) @ B.t()
        y = y if layer.bias is None else y + layer.bias.double()
        y.backward(gy.double(), retain_graph=True)
        found |= {f"y {index}": y, f"gA {index}": A.grad, f"gB {index}": B.grad}
    return found | {"gx": x.grad}


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted."""
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("case", [*(pytest.param(case, id=name) for name, case in CASES.items()), *SLOW])
def test_outputs_and_gradients_are_those_of_float64(device: torch.device, case: Case) -> None:
    x, layers = layers_of(case, device)
    seed = torch.tensor([987654321987], device=device)
    ys = adapted_linear(x, layers, case.p, seed, case.fused, TILES)
    gys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, gys)
    found = {"gx": x.grad}
    for index, (layer, y) in enumerate(zip(layers, ys, strict=True)):
        found |= {f"y {index}": y, f"gA {index}": layer.A.grad, f"gB {index}": layer.B.grad}
    wanted = reference(case, x, layers, seed, gys)
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    assert max(errors.values()) < TOLERANCE[case.dtype], errors


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_the_derivatives(device: torch.device, fused: bool) -> None:
    if device.type == "cuda":
        pytest.skip("float64 is for the interpreter: on a GPU these kernels are never chosen for it")
    case = Case(M=3, K=9, d_outs=(4,), ranks=(2,), dtype=torch.float64, factors=torch.float64)
    x, (layer,) = layers_of(case, device)
    seed = torch.tensor([5])

    def compute(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return adapted_linear(x, [Adapted(layer.W, layer.bias, A, B, SCALE)], 0.25, seed, fused, TILES)[0]

    torch.autograd.gradcheck(compute, (x, layer.A, layer.B), fast_mode=True)


def test_what_needs_no_gradient_gets_none(device: torch.device) -> None:
    x, (layer,) = layers_of(Case(), device)
    frozen = Adapted(layer.W, layer.bias, layer.A.detach(), layer.B, SCALE)
    (y,) = adapted_linear(x.detach(), [frozen], tiles=TILES)
    y.sum().backward()
    assert (x.grad, layer.A.grad, frozen.A.grad) == (None, None, None)
    assert layer.B.grad is not None


def test_x_keeps_its_leading_dimensions(device: torch.device) -> None:
    x, layers = layers_of(Case(M=6), device)
    flat, shaped = (adapted_linear(v, layers, tiles=TILES)[0] for v in (x, x.view(2, 3, -1)))
    assert torch.equal(shaped, flat.view(2, 3, -1))


def test_the_mask_follows_torch_s_generator(device: torch.device) -> None:
    """Which gradient checkpointing restores before it computes a layer again."""
    x, layers = layers_of(Case(M=6), device)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return adapted_linear(x, layers, 0.5, tiles=TILES)[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_every_misfit_is_named_at_once(device: torch.device) -> None:
    x, (layer,) = layers_of(Case(), device)
    trained = Adapted(layer.W.clone().requires_grad_(), None, layer.A, layer.B[:, 1:])
    with pytest.raises(ShapeError, match=r"layer 0: A .*layer 0: W or bias asks.*layer 1: W is torch.float64"):
        adapted_linear(x, [trained, Adapted(layer.W.double(), None, layer.A, layer.B)])


def test_a_p_that_is_no_probability_is_refused(device: torch.device) -> None:
    x, layers = layers_of(Case(), device)
    with pytest.raises(ConfigError, match=r"dropout 1\.5"):
        adapted_linear(x, layers, 1.5)
