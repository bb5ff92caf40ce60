"""``Terms``: what an update is, as a value that every path reads.

    W' = row_scale * (W + scale * (out_gain * B) (rank_gain * A)) + dense    [d_out, d_in]
    b' = b + bias_shift                                                      [d_out]

A stack of matrices (experts) has the leading dimension ``[E]`` on every tensor. LoRA uses ``A``, ``B`` and
``scale`` (Hu et al. 2021, arXiv 2106.09685, eq. 3); DoRA adds ``row_scale``; rank-masked methods use
``rank_gain``; VeRA both gains. The plain forward below, the dense ``delta`` and every fast path say the
same thing; tests hold them to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.layers.ops import BranchOps


@dataclass(frozen=True)
class Terms:
    """One layer's update.

    >>> terms = Terms(A=torch.tensor([[0.1, -0.2]]), B=torch.tensor([[0.3], [-0.4], [0.5]]), scale=2.0)
    >>> terms.delta(torch.zeros(3, 2)).shape
    torch.Size([3, 2])

    Attributes:
        A: down factor, ``[rank, d_in]``; None for an update without a product.
        B: up factor, ``[d_out, rank]``.
        scale: dimensionless factor on ``B A`` (alpha / rank in LoRA).
        rank_gain: ``[rank]`` factor between A and B, or None for ones.
        out_gain: ``[d_out]`` factor on B's rows, or None for ones.
        row_scale: ``[d_out]`` factor on the rows of base plus update, or None for ones.
        bias_shift: ``[d_out]`` what is added to the layer's bias, or None.
        dense: ``[d_out, d_in]`` plain change of the weight, or None.
        dropout: probability with which the input of A is dropped while training.
    """

    A: Tensor | None
    B: Tensor | None
    scale: float = 1.0
    rank_gain: Tensor | None = None
    out_gain: Tensor | None = None
    row_scale: Tensor | None = None
    bias_shift: Tensor | None = None
    dense: Tensor | None = None
    dropout: float = 0.0

    @property
    def is_pair(self) -> bool:
        """Whether the product is ``scale * B A`` and nothing else changes the weight, but perhaps ``row_scale``."""
        return self.A is not None and self.rank_gain is None and self.out_gain is None and self.dense is None

    def low_rank(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return detached factors ``(A', B')`` with all gains and the scale in them: ``B' A'`` is the low-rank part."""
        with torch.no_grad():
            A, B = self._factors(dtype)
        return A.detach(), B.detach()

    def delta(self, W: Tensor) -> Tensor:
        """Return ``W' - W``, detached, in fp32, or in fp64 for an fp64 weight.

        Args:
            W: the base weight as a matrix, ``[d_out, d_in]``, any float dtype.
        """
        with torch.no_grad():
            return self.change(W.detach())

    def change(self, W: Tensor) -> Tensor:
        """Return ``W' - W`` as :meth:`delta` does, differentiable in the update's tensors."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        if self.A is None:
            return torch.zeros(W.shape, dtype=dtype, device=W.device) if self.dense is None else self.dense.to(dtype)
        A, B = self._factors(dtype)
        with torch.autocast(W.device.type, enabled=False):  # what is merged must not depend on who runs it
            low = B @ A
        if self.row_scale is not None:
            base = W.to(dtype)
            low = self.row_scale.to(dtype)[..., :, None] * (base + low) - base
        return low if self.dense is None else low + self.dense.to(dtype)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.A is not None
        assert self.B is not None
        A, B = self.A.to(dtype), self.B.to(dtype) * self.scale
        if self.rank_gain is not None:
            A = A * self.rank_gain.to(dtype)[..., :, None]
        if self.out_gain is not None:
            B = B * self.out_gain.to(dtype)[..., :, None]
        return A, B


def add_update(
    ops: BranchOps,
    layer: nn.Module,
    x: Tensor,
    base_out: Tensor,
    out: Tensor,
    terms: Terms,
    weight: float = 1.0,
    training: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Return ``out + weight * (W' x + b' - W x - b)``, the plain path.

    Args:
        ops: the host's operations.
        layer: the host.
        x: the layer's input.
        base_out: the base's output ``W x + b`` for this input.
        out: what other adapters have made of it so far, same shape and dtype.
        terms: the update.
        weight: the adapter's strength, dimensionless; 0 means no effect.
        training: whether dropout acts.
        seed: of the mask on an input that the layer multiplies by its weight; None to draw one by torch's own dropout.

    Returns:
        A tensor of ``out``'s shape and dtype. The factors are rounded to that dtype for the products;
        parameters and their gradients keep their own.
    """
    if terms.A is not None and terms.B is not None:
        out = _add_product(ops, layer, x, base_out, out, terms, weight, training, seed)
    if terms.dense is not None:
        change = ops.product(layer, x, (weight * terms.dense).to(base_out.dtype), base_out)
        out = ops.widen(layer, out, ops.narrow(layer, out) + change)
    if terms.bias_shift is not None:
        shift = ops.channelwise(layer, (weight * terms.bias_shift).to(base_out.dtype))
        out = ops.widen(layer, out, ops.narrow(layer, out) + shift)
    return out


def _add_product(
    ops: BranchOps,
    layer: nn.Module,
    x: Tensor,
    base_out: Tensor,
    out: Tensor,
    terms: Terms,
    weight: float,
    training: bool,
    seed: int | None,
) -> Tensor:
    """Return ``out + weight * (W' - W) x``."""
    assert terms.A is not None
    assert terms.B is not None
    dtype = base_out.dtype
    A, B = terms.A.to(dtype), terms.B.to(dtype)
    p = terms.dropout if training else 0.0
    h = ops.dropped_down(layer, x, A, base_out, p, seed) if p > 0.0 else ops.down(layer, x, A, base_out)
    if terms.rank_gain is not None:
        h = h * ops.rankwise(layer, terms.rank_gain.to(dtype))
    if terms.out_gain is not None:
        B = B * terms.out_gain.to(dtype)[:, None]
    if terms.row_scale is None:
        return ops.accumulate(layer, out, h, B, terms.scale * weight)
    product, bias = ops.narrow(layer, base_out), ops.bias(layer)
    if bias is not None:
        product = product - ops.channelwise(layer, bias.to(dtype))
    update = ops.up(layer, h * terms.scale, B).to(dtype)
    gain = ops.channelwise(layer, terms.row_scale.to(dtype))
    return ops.widen(layer, out, ops.narrow(layer, out) + weight * (gain * (product + update) - product))
