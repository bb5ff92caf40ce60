"""``Terms``: what an update is, as a value that every path reads.

    W' = row_scale * (W + scale * (out_gain * B) (rank_gain * A))        [d_out, d_in]
    b' = b + bias_shift                                                  [d_out]

LoRA uses ``A``, ``B`` and ``scale`` (Hu et al. 2021, arXiv 2106.09685, eq. 3); DoRA adds
``row_scale``; rank-masked methods use ``rank_gain``; VeRA both gains. The plain forward below, the
dense ``delta`` and every fast path say the same thing; tests hold them to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.layers.ops import LayerOps


@dataclass(frozen=True)
class Terms:
    """One layer's update.

    >>> terms = Terms(A=torch.tensor([[0.1, -0.2]]), B=torch.tensor([[0.3], [-0.4], [0.5]]), scale=2.0)
    >>> terms.delta(torch.zeros(3, 2)).shape
    torch.Size([3, 2])

    Attributes:
        A: down factor, ``[rank, d_in]``; None for an update of the bias alone.
        B: up factor, ``[d_out, rank]``.
        scale: dimensionless factor on ``B A`` (alpha / rank in LoRA).
        rank_gain: ``[rank]`` factor between A and B, or None for ones.
        out_gain: ``[d_out]`` factor on B's rows, or None for ones.
        row_scale: ``[d_out]`` factor on the rows of base plus update, or None for ones.
        bias_shift: ``[d_out]`` what is added to the layer's bias, or None.
        dropout: probability with which the input of A is dropped while training.
    """

    A: Tensor | None
    B: Tensor | None
    scale: float = 1.0
    rank_gain: Tensor | None = None
    out_gain: Tensor | None = None
    row_scale: Tensor | None = None
    bias_shift: Tensor | None = None
    dropout: float = 0.0

    def low_rank(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return factors ``(A', B')`` with every gain and the scale in them: ``B' A'`` is the low-rank part."""
        assert self.A is not None
        assert self.B is not None
        A, B = self.A.detach().to(dtype), self.B.detach().to(dtype) * self.scale
        if self.rank_gain is not None:
            A = A * self.rank_gain.detach().to(dtype)[:, None]
        if self.out_gain is not None:
            B = B * self.out_gain.detach().to(dtype)[:, None]
        return A, B

    def delta(self, W: Tensor) -> Tensor:
        """Return ``W' - W`` in fp32, or in fp64 for an fp64 weight.

        Args:
            W: the base weight as a matrix, ``[d_out, d_in]``, any float dtype.
        """
        dtype = torch.promote_types(W.dtype, torch.float32)
        if self.A is None:
            return torch.zeros(W.shape, dtype=dtype, device=W.device)
        A, B = self.low_rank(dtype)
        low = B @ A
        if self.row_scale is None:
            return low
        base = W.to(dtype)
        return self.row_scale.detach().to(dtype)[:, None] * (base + low) - base


def add_update(
    ops: LayerOps,
    layer: nn.Module,
    x: Tensor,
    base_out: Tensor,
    out: Tensor,
    terms: Terms,
    weight: float = 1.0,
    training: bool = False,
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

    Returns:
        A tensor of ``out``'s shape and dtype. The factors are rounded to that dtype for the products;
        parameters and their gradients keep their own.
    """
    dtype = base_out.dtype
    if terms.A is not None and terms.B is not None:
        A, B = terms.A.to(dtype), terms.B.to(dtype)
        p = terms.dropout if training else 0.0
        h = ops.dropped_down(layer, x, A, p) if p > 0.0 else ops.down(layer, x, A)
        if terms.rank_gain is not None:
            h = h * ops.channelwise(layer, terms.rank_gain.to(dtype))
        if terms.out_gain is not None:
            B = B * terms.out_gain.to(dtype)[:, None]
        if terms.row_scale is None:
            out = ops.accumulate(layer, out, h, B, terms.scale * weight)
        else:
            bias = ops.bias(layer)
            product = base_out if bias is None else base_out - ops.channelwise(layer, bias.to(dtype))
            update = ops.up(layer, h * terms.scale, B).to(dtype)
            gain = ops.channelwise(layer, terms.row_scale.to(dtype))
            out = out + weight * (gain * (product + update) - product)
    if terms.bias_shift is not None:
        out = out + ops.channelwise(layer, (weight * terms.bias_shift).to(dtype))
    return out
