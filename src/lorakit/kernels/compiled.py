"""The fast path of an adapted linear layer as an operation that ``torch.compile`` takes whole into its graph.

The compiler would add an update to the base's output out of place, which costs another pass over it, and draw a
dropout mask number by number. As one operation the layer computes as :mod:`lorakit.kernels.linear` does; what is around
it is fused by the compiler. Layers that read the same input are not joined here, and each draws a mask of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.kernels.dropout import draw_seed
from lorakit.kernels.linear import Gradients, Kept, Linear, Plan, low, with_update


def compiled_linear(x: Tensor, layer: Linear, p: float) -> Tensor:
    """Return the output ``[..., d_out]`` of a layer with one pair and without a gain, for the compiler's graph.

    Args:
        x: ``[..., d_in]``.
        layer: see :class:`~lorakit.kernels.linear.Linear`.
        p: probability with which the update's input is dropped.
    """
    ((A, B, scale),) = layer.pairs
    found: tuple[Tensor, Tensor, Tensor] = _forward(
        x, layer.W, layer.bias, A.to(x.dtype), B.to(x.dtype), scale / (1.0 - p), p
    )
    return found[0]


def _plan(A: Tensor, scale: float, p: float, seed: int) -> Plan:
    return Plan(((scale,),), ((A.shape[0],),), p, seed)


@torch.library.custom_op("lorakit::adapted_linear", mutates_args=())
def _forward(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, ``H`` and the mask's seed."""
    seed = draw_seed() if p > 0.0 else 0
    H = low(_plan(A, scale, p, seed), x.reshape(-1, x.shape[-1]), A)
    return with_update(x, W, bias, None, [(H, B)]), H, torch.tensor(seed)


@_forward.register_fake
def _(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    seed = torch.empty((), dtype=torch.int64)
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(rows, A.shape[0]), seed


@torch.library.custom_op("lorakit::adapted_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor | None,
    H: Tensor | None,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    seed: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients that are needed of x, bias, A and B, of the last one transposed."""
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    of_x, of_bias, of_A, of_B = needs
    found = Gradients(_plan(A, scale, p, int(seed)), rows, H, A, of_x, [of_A, of_B])
    found.take(0, Kept(B, W, None, None, None), grad.reshape(-1, grad.shape[-1]), of_bias)
    gA, gB = found.of_pairs()
    gx = None if found.gx is None else found.gx.view(*grad.shape[:-1], -1)
    return [g for g in (gx, found.beside[0], gA, None if gB is None else gB.t().contiguous()) if g is not None]


@_backward.register_fake
def _(grad: Tensor, x: Tensor | None, H: Tensor | None, W: Tensor, A: Tensor, B: Tensor, *others: Any) -> list[Tensor]:
    *_, needs = others
    shapes = ((*grad.shape[:-1], W.shape[1]), (W.shape[0],), tuple(A.shape), (B.shape[1], B.shape[0]))
    return [grad.new_empty(shape) for shape, need in zip(shapes, needs, strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W, _, A, B, ctx.scale, ctx.p = inputs
    of_x, _, of_bias, of_A, of_B, *_ = ctx.needs_input_grad
    ctx.needs = [of_x, of_bias, of_A, of_B]
    ctx.save_for_backward(x if of_A else None, output[1] if of_B else None, W, A, B, output[2])


def _differentiate(ctx: Any, grad: Tensor, *beside: Tensor) -> tuple[Tensor | None, ...]:
    x, H, W, A, B, seed = ctx.saved_tensors
    found = iter(_backward(grad, x, H, W, A, B, ctx.scale, ctx.p, seed, ctx.needs))
    gx, g_bias, gA, gB = (next(found) if need else None for need in ctx.needs)
    return gx, None, g_bias, gA, None if gB is None else gB.t(), None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
