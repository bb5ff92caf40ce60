"""Linear layers that read one input, with their low-rank updates, as one node of the graph.

    H_i = c_i (x * mask) A_i^T                              one pass over x for all layers, c_i = scale_i / (1 - p)
    y_i = x W_i^T + b_i + H_i B_i^T                         added in place
    gx  = sum_i gy_i W_i + (gH [A_1; ...; A_n]) * mask      one buffer, gH_i = c_i gy_i B_i
    gA  = gH^T (x * mask),   gB_i = gy_i^T H_i

With a gain on the rows of base and update (DoRA) it is ``y_i = g_i * (x W_i^T + H_i B_i^T) + b_i``, and the gain's
gradient ``sum gy_i * (y_i - b_i) / g_i`` is taken from the output itself, which most models keep anyway.

The order of products goes through the rank, so that no ``[d_out, d_in]`` gradient is formed (RunLoRA, arXiv
2312.03415, compares the orders). What is kept for the backward pass is x, as it came and once, the ``[tokens, rank]``
products, A and B as they were multiplied, and the mask's seed; x is not kept where no A is trained (LoRA-FA). Scaling H
and its gradient, which are narrow, costs less than scaling B and B's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.kernels.dropout import is_real, mask


class Pair(NamedTuple):
    """One update of a linear layer.

    Attributes:
        A: ``[rank, d_in]``, B: ``[d_out, rank]``; any float dtype, rounded to the input's for the products.
        scale: factor on ``B A``.
    """

    A: Tensor
    B: Tensor
    scale: float


class Linear(NamedTuple):
    """A frozen linear layer with its updates.

    Attributes:
        W: ``[d_out, d_in]``, in the input's dtype.
        bias: ``[d_out]`` or None.
        pairs: its updates; their ranks may differ.
        gain: ``[d_out]`` factor on base and updates, without the bias, in the input's dtype; None for ones. The output
            then must not be written to before the backward pass.
    """

    W: Tensor
    bias: Tensor | None
    pairs: Sequence[Pair]
    gain: Tensor | None = None


def adapted_linears(x: Tensor, layers: Sequence[Linear], p: float = 0.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Return every layer's output for one input.

    Args:
        x: ``[..., d_in]``.
        layers: they all read ``x``.
        p: probability with which the updates' input is dropped; the same entries for all.
        seed: says which, see :func:`lorakit.kernels.dropout.mask`.

    Returns:
        ``[..., d_out]`` for each layer, in ``x``'s dtype.
    """
    if p == 0.0 and not torch.is_grad_enabled():
        return tuple(_output(x, layer) for layer in layers)
    tensors = [t for layer in layers for pair in layer.pairs for t in (pair.A, pair.B)]
    frozen = [layer.W for layer in layers]
    beside = [tensor for layer in layers for tensor in (layer.bias, layer.gain)]
    plan = Plan(
        scales=tuple(tuple(pair.scale / (1.0 - p) for pair in layer.pairs) for layer in layers),
        ranks=tuple(tuple(pair.A.shape[0] for pair in layer.pairs) for layer in layers),
        p=p,
        seed=seed,
    )
    found: tuple[Tensor, ...] = _Adapted.apply(plan, x, *frozen, *beside, *tensors)  # type: ignore[no-untyped-call]
    return found


def _output(x: Tensor, layer: Linear) -> Tensor:
    """Return one layer's output where no gradient is asked for: the same products without the node around them."""
    rows = x.reshape(-1, x.shape[-1])
    updates = []
    for A, B, scale in layer.pairs:
        H = rows @ _cast(A, x.dtype).t()
        updates.append((H if scale == 1.0 else H.mul_(scale), _cast(B, x.dtype)))
    return with_update(x, layer.W, layer.bias, layer.gain, updates)


def with_update(
    x: Tensor, W: Tensor, bias: Tensor | None, gain: Tensor | None, updates: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return ``gain * (x W^T + sum H B^T) + bias``, the updates ``(H, B)`` added in place."""
    y = F.linear(x, W, bias if gain is None else None)
    flat = y.view(-1, y.shape[-1])
    for H, B in updates:
        flat.addmm_(H, B.t())
    if gain is not None:
        y.mul_(gain)
        y = y if bias is None else y.add_(bias)
    return y


@dataclass(frozen=True)
class Plan:
    """How the updates of some layers are taken.

    Attributes:
        scales: each pair's, with ``1 / (1 - p)`` in it, by layer; ``ranks`` alike.
        p: probability with which their input is dropped.
        seed: says where.
    """

    scales: tuple[tuple[float, ...], ...]
    ranks: tuple[tuple[int, ...], ...]
    p: float
    seed: int

    @property
    def widths(self) -> list[int]:
        """How many columns of H are each layer's."""
        return [sum(ranks) for ranks in self.ranks]

    def scaled_(self, H: Tensor) -> Tensor:
        """Multiply the columns of ``[tokens, ranks]`` by their scales, in place."""
        scales = [scale for layer in self.scales for scale in layer]
        if len(set(scales)) == 1:
            return H if scales[0] == 1.0 else H.mul_(scales[0])
        ranks = [rank for layer in self.ranks for rank in layer]
        columns = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
        return H.mul_(torch.tensor(columns, dtype=H.dtype, device=H.device))

    def dropped(self, x: Tensor) -> Tensor:
        """Return the updates' input, but for the factor ``1 / (1 - p)``."""
        return x * self.mask(x) if self.p > 0.0 else x

    def mask(self, x: Tensor) -> Tensor:
        """Return the mask of an input."""
        return mask(x.shape, self.p, self.seed, x.dtype, x.device)


class _Adapted(torch.autograd.Function):
    """Its tensors: all W, bias and gain of each layer, A and B of each pair."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(plan.ranks)
        weights, biases, gains = tensors[:n], tensors[n : 3 * n : 2], tensors[n + 1 : 3 * n : 2]
        pairs = tensors[3 * n :]
        rows = x.reshape(-1, x.shape[-1])
        A, Bs = _joined(pairs[0::2], x.dtype), _by_layer(plan, pairs[1::2], x.dtype)
        H = low(plan, rows, A)
        parts = zip(weights, biases, gains, _split(H, plan.widths, 1), Bs, strict=True)
        out = [with_update(x, W, bias, gain, [(h, B)]) for W, bias, gain, h, B in parts]
        needs = ctx.needs_input_grad[2 + 3 * n :]
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        ctx.dtypes = [tensor.dtype for tensor in pairs]
        ctx.save_for_backward(
            x if any(needs[0::2]) or any(gain is not None for gain in gains) else None,
            H if any(needs[1::2]) or any(gain is not None for gain in gains) else None,
            A,
            *Bs,
            *weights,
            *[None if gain is None else bias for bias, gain in zip(biases, gains, strict=True)],
            *gains,
            *[None if gain is None else y for y, gain in zip(out, gains, strict=True)],
        )
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        n = len(ctx.plan.ranks)
        x, H, A, *rest = ctx.saved_tensors
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        needs = ctx.needs_input_grad
        found = Gradients(ctx.plan, rows, H, A, needs[1], list(needs[2 + 3 * n :]))
        layers = [Kept(*rest[i::n]) for i in range(n)]
        for i, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
            if grad is None:
                found.skip(i)
            else:
                found.take(i, layer, grad.reshape(-1, grad.shape[-1]), needs[2 + n + 2 * i])
        typed = [None if g is None else _cast(g, dtype) for g, dtype in zip(found.of_pairs(), ctx.dtypes, strict=True)]
        gx = None if found.gx is None else found.gx.view(ctx.shape)
        return None, gx, *[None] * n, *found.beside, *typed


class Kept(NamedTuple):
    """What is kept of one layer; ``bias`` and ``out`` only beside a gain."""

    B: Tensor
    W: Tensor
    bias: Tensor | None
    gain: Tensor | None
    out: Tensor | None


class Gradients:
    """The gradients of one node, gathered layer by layer in as few buffers as they need."""

    def __init__(
        self, plan: Plan, rows: Tensor | None, H: Tensor | None, A: Tensor, needs_x: bool, needs: list[bool]
    ) -> None:
        self.plan, self.rows, self.A, self.needs_x = plan, rows, A, needs_x
        self.needs_A, self.needs_B = needs[0::2], needs[1::2]
        self.parts: Sequence[Tensor | None] = [None] * len(plan.ranks) if H is None else _split(H, plan.widths, 1)
        self.gx: Tensor | None = None
        self.low: list[Tensor | None] = []
        self.beside: list[Tensor | None] = []
        self.gBs: list[Tensor | None] = []

    def skip(self, i: int) -> None:
        """Take note that a layer's output was not used."""
        self.low.append(None)
        self.beside += [None, None]
        self.gBs += [None] * len(self.plan.ranks[i])

    def take(self, i: int, layer: Kept, gy: Tensor, needs_bias: bool) -> None:
        """Add what a layer's ``[tokens, d_out]`` gradient brings."""
        ranks, h = self.plan.ranks[i], self.parts[i]
        self.beside += [gy.sum(dim=0) if needs_bias else None, self._of_gain(layer, gy, h)]
        if layer.gain is not None:
            gy = gy * layer.gain
        if self.needs_x:
            self.gx = gy @ layer.W if self.gx is None else self.gx.addmm_(gy, layer.W)
        self.low.append(gy @ layer.B)
        if h is None:
            self.gBs += [None] * len(ranks)
        else:
            self.gBs += [part.t() for part in _split(h.t() @ gy, ranks, 0)]

    def _of_gain(self, layer: Kept, gy: Tensor, h: Tensor | None) -> Tensor | None:
        """Return ``sum gy * u`` over the tokens, ``u = (out - bias) / gain`` what was multiplied by the gain.

        Where a gain is exactly 0 its row of ``u`` is computed again.
        """
        if layer.gain is None or layer.out is None:
            return None
        wide = torch.promote_types(gy.dtype, torch.float32)
        total = (gy * layer.out.reshape(gy.shape)).sum(dim=0, dtype=wide)
        if layer.bias is not None:
            total -= layer.bias.to(wide) * gy.sum(dim=0, dtype=wide)
        zero = layer.gain == 0
        found = total / layer.gain.to(wide).masked_fill(zero, 1.0)
        if is_real(zero) and bool(zero.any()):
            assert self.rows is not None
            assert h is not None
            u = self.rows @ layer.W[zero].t() + h @ layer.B[zero].t()
            found[zero] = (gy[:, zero] * u).sum(dim=0, dtype=wide)
        return found.to(layer.gain.dtype)

    def of_pairs(self) -> list[Tensor | None]:
        """Return the gradients of A and B, in turn; adds to that of x what comes through A."""
        gAs: list[Tensor | None] = [None] * len(self.needs_A)
        kept = [g for g in self.low if g is not None]
        if kept:
            parts = [_or_zeros(g, kept[0], width) for g, width in zip(self.low, self.plan.widths, strict=True)]
            gH = self.plan.scaled_(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
            if self.gx is not None and self.plan.p == 0.0:
                self.gx.addmm_(gH, self.A)
            elif self.gx is not None:
                self.gx.addcmul_(gH @ self.A, self.plan.mask(self.gx))
            if self.rows is not None and any(self.needs_A):
                gA = gH.t() @ self.plan.dropped(self.rows)
                gAs = list(_split(gA, [rank for ranks in self.plan.ranks for rank in ranks], 0))
        wanted = [need for both in zip(self.needs_A, self.needs_B, strict=True) for need in both]
        given = [g for both in zip(gAs, self.gBs, strict=True) for g in both]
        return [g if need else None for g, need in zip(given, wanted, strict=True)]


def _joined(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return all A, one below the other, ``[ranks, d_in]``."""
    return _cast(As[0], dtype) if len(As) == 1 else torch.cat([_cast(A, dtype) for A in As])


def low(plan: Plan, rows: Tensor, A: Tensor) -> Tensor:
    """Return ``H``, ``[tokens, ranks]``, of the rows of an input."""
    return plan.scaled_(plan.dropped(rows) @ A.t())


def _by_layer(plan: Plan, Bs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return each layer's B, one beside the other, ``[d_out, ranks]``."""
    found, given = [], iter(Bs)
    for ranks in plan.ranks:
        own = [_cast(next(given), dtype) for _ in ranks]
        found.append(own[0] if len(own) == 1 else torch.cat(own, dim=1))
    return found


def _or_zeros(found: Tensor | None, like: Tensor, width: int) -> Tensor:
    return like.new_zeros(len(like), width) if found is None else found


def _cast(found: Tensor, dtype: torch.dtype) -> Tensor:
    return found if found.dtype == dtype else found.to(dtype)


def _split(found: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    return (found,) if len(sizes) == 1 else torch.split(found, list(sizes), dim)
