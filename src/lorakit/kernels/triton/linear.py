"""Linear layers that read the same x, each with one low-rank update, on Triton's kernels.

    y_i = x W_i^T + b_i + s_i (mask * x / (1 - p)) A_i^T B_i^T

Forward: one kernel makes ``H = drop(x) [A_1; A_2; ...]^T``, reading x once for all layers; the base's product stays
the vendor's; one kernel per layer adds ``s H B^T`` in place. With ``fused`` base and update are a single kernel.

Backward: one pass over gy gives gH and gB; the base's products are summed into gx in place; one pass over x and gx
adds the adapters' part to gx and gives gA. Where a pass reads an activation once and sums two products from it
follows LoRAFusion (Zhu et al. 2025, arXiv 2510.00206); the mask that is never stored but made again, several layers in
one pass, the split sums without atomic additions, and gradients of the factors that are never rounded below fp32 are
our own.

Kept for the backward pass: x, ``H`` of all ranks in x's dtype, the seed. W must be frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.errors import ShapeError
from lorakit.kernels.triton import masks
from lorakit.kernels.triton.launch import Tiles, accumulator, arithmetic, cdiv, compiled, tiles_for


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer and its update ``scale * B A``.

    Attributes:
        W: ``[d_out, d_in]`` in x's dtype, frozen.
        bias: ``[d_out]`` in x's dtype, frozen, or None.
        A: ``[rank, d_in]``, any float dtype.
        B: ``[d_out, rank]``, A's dtype.
        scale: alpha / rank, dimensionless.
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float = 1.0

    def problems(self, x: Tensor) -> list[str]:
        """Return what does not fit together, in words."""
        d_out, d_in = self.W.shape
        rank = self.A.shape[0]
        found = []
        if x.shape[-1] != d_in:
            found.append(f"x has {x.shape[-1]} columns, W of {d_out} x {d_in} needs {d_in}")
        if self.A.shape != (rank, d_in) or self.B.shape != (d_out, rank):
            found.append(f"A {list(self.A.shape)} and B {list(self.B.shape)} are no [rank, {d_in}] and [{d_out}, rank]")
        if self.W.dtype != x.dtype or (self.bias is not None and self.bias.dtype != x.dtype):
            found.append(f"W is {self.W.dtype}, x is {x.dtype}: convert one of them")
        if self.W.requires_grad or (self.bias is not None and self.bias.requires_grad):
            found.append("W or bias asks for a gradient: these kernels compute none; freeze them")
        return found


@dataclass(frozen=True)
class _Plan:
    """What a call does beside its tensors."""

    scales: tuple[float, ...]
    ranks: tuple[int, ...]
    p: float
    fused: bool
    tiles: Tiles
    keep: bool


def adapted_linear(
    x: Tensor,
    layers: Sequence[Adapted],
    p: float = 0.0,
    seed: Tensor | None = None,
    fused: bool = False,
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """Return what each of several adapted linear layers makes of the same x.

    Args:
        x: ``[..., d_in]``.
        layers: the layers; one dropout mask serves all of them.
        p: probability with which an element of x is dropped on its way into A.
        seed: the mask's seed, one int64 on x's device; None draws one from torch's generator.
        fused: compute base and update in one kernel instead of the vendor's product and an addition.
        tiles: how the work is cut; None chooses by dtype and device.

    Returns:
        ``[..., d_out]`` of every layer, in x's dtype, differentiable in x, A and B.

    Raises:
        ShapeError: tensors do not fit each other, or a base weight asks for a gradient.
        ConfigError: p is no probability below 1.
    """
    problems = [f"layer {number}: {text}" for number, layer in enumerate(layers) for text in layer.problems(x)]
    if problems or not layers:
        raise ShapeError("; ".join(problems) or "adapted_linear needs at least one layer.")
    if masks.threshold(p) and seed is None:
        seed = masks.new_seed(x.device)
    factors = [factor for layer in layers for factor in (layer.A, layer.B)]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in [x, *factors])
    plan = _Plan(
        scales=tuple(layer.scale for layer in layers),
        ranks=tuple(layer.A.shape[0] for layer in layers),
        p=p,
        fused=fused,
        tiles=tiles or tiles_for(x),
        keep=keep,
    )
    bases = [tensor for layer in layers for tensor in (layer.W, layer.bias)]
    flat = x.reshape(-1, x.shape[-1])
    outs = cast("Any", _AdaptedLinear).apply(plan, flat, seed, *bases, *factors)
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


class _AdaptedLinear(torch.autograd.Function):
    """See :func:`adapted_linear`; x is ``[M, K]``."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, seed: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        count = len(plan.ranks)
        bases = [(cast(Tensor, tensors[2 * i]), tensors[2 * i + 1]) for i in range(count)]
        factors = [cast(Tensor, tensor) for tensor in tensors[2 * count :]]
        x = x.contiguous()
        A = _joined(factors[0::2])
        H = _shrink(x, A, seed, plan)
        kept = torch.empty(x.shape[0] if plan.keep else 0, A.shape[0], dtype=x.dtype, device=x.device)
        outs = []
        for index, (W, bias) in enumerate(bases):
            B = factors[2 * index + 1].contiguous()
            compute = _fused if plan.fused else _added
            outs.append(compute(x, W, bias, H, B, kept, plan, index))
        ctx.plan = plan
        ctx.save_for_backward(x, seed, kept, *(W for W, _ in bases), *factors)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        count = len(plan.ranks)
        x, seed, H, *rest = ctx.saved_tensors
        weights, factors = rest[:count], rest[count:]
        needs = ctx.needs_input_grad[3 + 2 * count :]
        gys = [grad.contiguous() for grad in grads]
        gH = torch.empty_like(H)
        gB: list[Tensor | None] = []
        for index, gy in enumerate(gys):
            found = _output_gradients(gy, factors[2 * index + 1].contiguous(), H, gH, plan, index)
            gB.append(found.to(factors[2 * index + 1].dtype) if needs[2 * index + 1] else None)
        gx = None
        if ctx.needs_input_grad[1]:
            gx = gys[0] @ weights[0]
            for gy, W in zip(gys[1:], weights[1:], strict=True):
                gx.addmm_(gy, W)
        need_A, gA = any(needs[0::2]), None
        if need_A or gx is not None:
            gA = _input_gradients(x, _joined(factors[0::2]), gH, gx, seed, plan, need_A)
        out: list[Tensor | None] = [None, gx, None, *([None] * 2 * count)]
        for index in range(count):
            first = sum(plan.ranks[:index])
            part = gA[first : first + plan.ranks[index]] if gA is not None and needs[2 * index] else None
            out.append(None if part is None else part.to(factors[2 * index].dtype))
            out.append(gB[index])
        return tuple(out)


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """Return the down factors below each other, ``[sum of ranks, d_in]``."""
    return factors[0].contiguous() if len(factors) == 1 else torch.cat(list(factors))


def _seed(seed: Tensor | None, x: Tensor) -> Tensor:
    """Return the seed, or any tensor in its place where no mask is made."""
    return x if seed is None else seed


def _dropout(plan: _Plan) -> dict[str, Any]:
    return {"threshold": masks.threshold(plan.p), "gain": masks.gain(plan.p), "DROP": masks.threshold(plan.p) > 0}


def _shrink(x: Tensor, A: Tensor, seed: Tensor | None, plan: _Plan) -> Tensor:
    """Return ``H[splits, M, R]``, to be summed over the splits."""
    (M, K), R, tiles = x.shape, A.shape[0], plan.tiles
    BR, BK, BM = tiles.rank_block(R), tiles.depth, tiles.masked_rows()
    across = cdiv(M, BM) * cdiv(R, BR)
    chunk = tiles.share(K, BK, across)
    splits = cdiv(K, chunk)
    H = torch.empty(splits, M, R, dtype=accumulator(x.dtype), device=x.device)
    compiled("device_linear").shrink[(cdiv(M, BM), splits, cdiv(R, BR))](
        x, A, H, _seed(seed, x), M, K, R, chunk, **_dropout(plan), BM=BM, BK=BK, BR=BR,
        **arithmetic(x.dtype), **tiles.launch(),
    )  # fmt: skip
    return H


def _added(
    x: Tensor, W: Tensor, bias: Tensor | None, H: Tensor, B: Tensor, kept: Tensor, plan: _Plan, index: int
) -> Tensor:
    """Return ``x W^T + bias + scale * H B^T``: the vendor's product, then an addition in place."""
    y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
    (M, N), tiles = y.shape, plan.tiles
    compiled("device_linear").expand[(cdiv(M, tiles.rows), cdiv(N, tiles.columns))](
        y, H, B, kept, M, N, H.shape[2], sum(plan.ranks[:index]), plan.ranks[index], plan.scales[index],
        SPLITS=H.shape[0], KEEP=plan.keep, BM=tiles.rows, BN=tiles.columns,
        BR=tiles.rank_block(plan.ranks[index]), **arithmetic(x.dtype), **tiles.launch(),
    )  # fmt: skip
    return y


def _fused(
    x: Tensor, W: Tensor, bias: Tensor | None, H: Tensor, B: Tensor, kept: Tensor, plan: _Plan, index: int
) -> Tensor:
    """Return the same from one kernel."""
    (M, K), N, tiles = x.shape, W.shape[0], plan.tiles
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    W, wider = (
        W.contiguous(),
        2 if x.element_size() == 2 else 1,
    )  # the accumulators of a larger tile must fit in registers
    compiled("device_linear").product[(cdiv(M, wider * tiles.rows) * cdiv(N, tiles.columns),)](
        x, W, W if bias is None else bias, H, B, y, kept,
        M, N, K, H.shape[2], sum(plan.ranks[:index]), plan.ranks[index], plan.scales[index],
        SPLITS=H.shape[0], KEEP=plan.keep, BIAS=bias is not None, BM=wider * tiles.rows, BN=tiles.columns,
        BK=tiles.depth, BR=tiles.rank_block(plan.ranks[index]), GROUP=8,
        **arithmetic(x.dtype), **(tiles.launch() | {"num_warps": wider * tiles.warps}),
    )  # fmt: skip
    return y


def _output_gradients(gy: Tensor, B: Tensor, H: Tensor, gH: Tensor, plan: _Plan, index: int) -> Tensor:
    """Write the layer's columns of gH, in gy's dtype, and return gB."""
    (M, N), rank, tiles = gy.shape, plan.ranks[index], plan.tiles
    first, wide = sum(plan.ranks[:index]), accumulator(gy.dtype)
    BR, across = tiles.rank_block(rank), cdiv(N, tiles.columns)
    chunk = tiles.share(M, tiles.rows, across * cdiv(rank, BR))
    shares_H = torch.empty(across, M, rank, dtype=wide, device=gy.device)
    shares_B = torch.empty(cdiv(M, chunk), N, rank, dtype=wide, device=gy.device)
    compiled("device_linear").output_gradients[(across, cdiv(M, chunk), cdiv(rank, BR))](
        gy, B, H, shares_H, shares_B, M, N, H.shape[1], first, rank, chunk, plan.scales[index],
        BM=tiles.rows, BN=tiles.columns, BR=BR, **arithmetic(gy.dtype), **tiles.launch(),
    )  # fmt: skip
    gH[:, first : first + rank] = shares_H.sum(0)
    return shares_B.sum(0)


def _input_gradients(
    x: Tensor, A: Tensor, gH: Tensor, gx: Tensor | None, seed: Tensor | None, plan: _Plan, need_A: bool
) -> Tensor | None:
    """Add the adapters' part to gx in place and return gA of all ranks."""
    (M, K), R, tiles = x.shape, A.shape[0], plan.tiles
    BR, BM, across = tiles.rank_block(R), tiles.masked_rows(), cdiv(K, tiles.columns)
    chunk = tiles.share(M, BM, across)
    shares = torch.empty(cdiv(M, chunk) if need_A else 0, R, K, dtype=accumulator(x.dtype), device=x.device)
    for first in range(0, R, BR):
        compiled("device_linear").input_gradients[(across, cdiv(M, chunk))](
            x, A, gH, x if gx is None else gx, shares, _seed(seed, x), M, K, R, first, chunk, **_dropout(plan),
            BM=BM, BK=tiles.columns, BR=BR, NEED_X=gx is not None, NEED_A=need_A,
            **arithmetic(x.dtype), **tiles.launch(),
        )  # fmt: skip
    return shares.sum(0) if need_A else None
