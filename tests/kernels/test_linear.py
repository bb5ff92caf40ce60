"""Linear layers that read one input, as one node: equal to the plain products, and nothing is kept without need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.kernels.dropout import mask
from lorakit.kernels.linear import Linear, Pair, adapted_linears

# The same products in another order: a few units in the last place of sums of some ten terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}
SEED = 12345

Sizes = list[tuple[int, list[int], bool]]
SHAPES: dict[str, Sizes] = {
    "one layer": [(5, [2], True)],
    "three of different ranks": [(5, [2], False), (9, [4], True), (3, [1], False)],
    "several pairs on each": [(6, [2, 3], True), (4, [1, 5], False)],
    "rank above the sides": [(3, [11], False)],
}


def layers_of(sizes: Sizes, d_in: int, dtype: torch.dtype, wide: torch.dtype | None = None) -> list[Linear]:
    """Return layers with random weights and pairs, at alpha != rank."""
    own = wide or dtype
    return [
        Linear(
            torch.randn(d_out, d_in, dtype=dtype),
            torch.randn(d_out, dtype=dtype) if bias else None,
            [
                Pair(
                    torch.randn(rank, d_in, dtype=own, requires_grad=True),
                    torch.randn(d_out, rank, dtype=own, requires_grad=True),
                    1.5 / rank,
                )
                for rank in ranks
            ],
        )
        for d_out, ranks, bias in sizes
    ]


def trained(layers: list[Linear]) -> list[Tensor]:
    return [tensor for layer in layers for pair in layer.pairs for tensor in (pair.A, pair.B)]


def plain(x: Tensor, layers: list[Linear], p: float) -> list[Tensor]:
    """Return the outputs as separate products."""
    keep = mask(x.reshape(-1, x.shape[-1]).shape, p, SEED, x.dtype, x.device).view(x.shape) if p else None
    dropped = x if keep is None else x * keep / (1 - p)
    found = []
    for layer in layers:
        y = x @ layer.W.t() + (0 if layer.bias is None else layer.bias)
        for pair in layer.pairs:
            y = y + pair.scale * (dropped @ pair.A.to(x.dtype).t()) @ pair.B.to(x.dtype).t()
        found.append(y)
    return found


def gradients(outputs: list[Tensor] | tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients_are_those_of_separate_products(dtype: torch.dtype, sizes: Sizes, p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, dtype=dtype, requires_grad=True)
    layers = layers_of(sizes, 7, dtype)
    found, expected = adapted_linears(x, layers, p, SEED), plain(x, layers, p)
    wanted = [x, *trained(layers)]
    grads = zip(gradients(found, wanted), gradients(expected, wanted), strict=True)
    for ours, theirs in [*zip(found, expected, strict=True), *grads]:
        assert ours.dtype == theirs.dtype
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_finite_differences(sizes: Sizes, p: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    layers = layers_of(sizes, 4, torch.float64)
    biases = [layer.bias.requires_grad_() for layer in layers if layer.bias is not None]

    def outputs(*_: Tensor) -> tuple[Tensor, ...]:
        return adapted_linears(x, layers, p, SEED)

    assert torch.autograd.gradcheck(outputs, (x, *trained(layers), *biases))


def test_pairs_in_fp32_on_a_bf16_layer_get_gradients_in_fp32() -> None:
    torch.manual_seed(2)
    x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
    layers = layers_of([(12, [4], True)], 16, torch.bfloat16, wide=torch.float32)
    found = gradients(adapted_linears(x, layers), [x, *trained(layers)])
    assert [grad.dtype for grad in found] == [torch.bfloat16, torch.float32, torch.float32]


def kept(x: Tensor, layers: list[Linear], p: float = 0.0) -> list[Tensor]:
    """Return what is kept for the backward pass, without weights and trained tensors."""
    own = {t.untyped_storage().data_ptr() for layer in layers for t in (layer.W, layer.bias) if t is not None}
    own |= {t.untyped_storage().data_ptr() for t in trained(layers)}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted_linears(x, layers, p, SEED)
    return list(found.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_input_is_kept_once_for_all_layers_and_never_its_mask(p: float) -> None:
    x = torch.randn(64, 48)
    found = kept(x, layers_of([(40, [2], False), (40, [2], False), (32, [2], False)], 48, torch.float32), p)
    assert [tensor.data_ptr() for tensor in found if tensor.numel() >= x.numel()] == [x.data_ptr()]


def test_with_the_first_factor_frozen_tokens_times_rank_numbers_are_kept_and_not_the_input() -> None:
    x = torch.randn(64, 48, requires_grad=True)
    layers = layers_of([(40, [2], False)], 48, torch.float32)
    layers[0].pairs[0].A.requires_grad_(False)
    found = kept(x, layers)
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in found}
    assert (64, 2) in {tuple(tensor.shape) for tensor in found}


def test_an_output_that_is_not_used_costs_no_gradient() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 7, requires_grad=True)
    layers = layers_of([(4, [2], True), (6, [3], False)], 7, torch.float32)
    first, _ = adapted_linears(x, layers)
    grads = torch.autograd.grad(first.sum(), [x, *trained(layers)], allow_unused=True)
    expected = torch.autograd.grad(plain(x, layers, 0.0)[0].sum(), [x, *trained(layers)[:2]])
    for ours, theirs in zip(grads[:3], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert all(grad is None or not grad.any() for grad in grads[3:])


def test_a_frozen_input_gets_no_gradient() -> None:
    x = torch.randn(5, 7)
    layers = layers_of([(4, [2], True)], 7, torch.float32)
    (out,) = adapted_linears(x, layers)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert layers[0].pairs[0].B.grad is not None


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    layers: list[Any] = layers_of([(4, [2], True)], 7, torch.float32)
    (first,) = torch.autograd.grad(adapted_linears(x, layers)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()  # type: ignore[no-untyped-call]
