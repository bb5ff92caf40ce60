"""Singular directions of base weights: all of them, or the largest ones quickly; and pairs made of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.errors import UnsupportedLayerError
from lorakit.layers import Site

KRYLOV_STEPS = 6
"""How often ``W W^T`` is applied for a report: right to 1e-4 where the singular values fall like ``1 / sqrt(i)``, and
for trained weights."""

_OVERSAMPLING = 8


@dataclass(frozen=True)
class Directions:
    """A thin singular value decomposition: ``left[d_out, r]``, ``values[r]`` (largest first), ``right[d_in, r]``."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Directions:
        """Return the ``count`` largest."""
        return Directions(self.left[..., :count], self.values[..., :count], self.right[..., :count])

    def last(self, count: int) -> Directions:
        """Return the ``count`` smallest."""
        start = self.values.shape[-1] - count
        return Directions(self.left[..., start:], self.values[..., start:], self.right[..., start:])

    def at(self, expert: int | None) -> Directions:
        """Return those of one matrix of a stack; all where there is no stack."""
        return self if expert is None else Directions(self.left[expert], self.values[expert], self.right[expert])


@torch.no_grad()
def all_directions(W: Tensor) -> Directions:
    """Return every singular value of a weight ``[d_out, d_in]`` and its directions, in fp32."""
    left, values, right = torch.linalg.svd(W.float(), full_matrices=False)
    return Directions(left, values, right.mT)


@torch.no_grad()
def top_directions(
    W: Tensor, count: int, steps: int = KRYLOV_STEPS, generator: torch.Generator | None = None
) -> Directions:
    """Return the ``count`` largest singular values of a weight and their directions.

    By randomised block Krylov iteration (Musco & Musco 2015, arXiv 1504.05477, algorithm 2): the best
    approximation of W from the span of ``(W W^T)^i W X`` for i = 0 .. ``steps``, X a gaussian block of ``count + 8``
    columns. Exact where that span would be the whole space. Directions whose singular values are nearly
    equal mix with each other, which leaves sums over them as they are.

    Args:
        W: ``[d_out, d_in]``, any float dtype; a stack of them has ``[E]`` in front.
        count: how many; at most the smaller side is returned.
        steps: how often ``W W^T`` is applied.
        generator: of X, on the CPU; a fixed seed where there is none.
    """
    W = W.float()
    smaller = min(W.shape[-2:])
    count = min(count, smaller)
    width = count + _OVERSAMPLING
    if width * (steps + 1) >= smaller:
        return all_directions(W).first(count)
    generator = generator or torch.Generator().manual_seed(0)
    X = torch.randn(*W.shape[:-2], W.shape[-1], width, generator=generator).to(W.device)
    blocks = [torch.linalg.qr(W @ X).Q]
    for _ in range(steps):
        blocks.append(torch.linalg.qr(W @ (W.mT @ blocks[-1])).Q)
    basis = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q
    left, values, right = torch.linalg.svd(basis.mT @ W, full_matrices=False)
    return Directions(basis @ left, values, right.mT).first(count)


def weight_to_start_from(site: Site, init: str) -> Tensor:
    """Return a site's base weight as a matrix in fp32, on its own device.

    Raises:
        UnsupportedLayerError: it is zero, or not finite: nothing to start from.
    """
    W = site.matrix().float()
    if not bool(torch.isfinite(W).all()):
        raise UnsupportedLayerError(f"init '{init}' cannot start at '{site.path}': its weight is not finite.")
    if not bool(W.flatten(len(site.stack)).any(dim=-1).all()):
        what = "a weight of its stack is zero" if site.stack else "its weight is zero"
        raise UnsupportedLayerError(
            f"init '{init}' cannot start at '{site.path}': {what}, and has no directions. Exclude this layer, or take "
            "init 'kaiming'."
        )
    return W


def visible(values: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return singular values with those that are only rounding raised to the smallest that is more.

    A direction that a weight does not have would make ``A = B = 0`` there, which has no gradient and never learns.

    Args:
        values: all of a weight's that are known, largest first; the first is not 0.
        sides: ``(d_out, d_in)``.
    """
    floor = values[..., :1] * max(sides) * torch.finfo(torch.float32).eps
    smallest = values.masked_fill(values <= floor, float("inf")).amin(dim=-1, keepdim=True)
    return values.maximum(smallest)


def balanced(found: Directions, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``A = sqrt(S / scale) V^T`` and ``B = U sqrt(S / scale)``, so that ``scale B A = U S V^T``."""
    root = (found.values / scale).sqrt()
    return root[..., :, None] * found.right.mT, found.left * root[..., None, :]
