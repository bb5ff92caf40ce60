"""LoRA-Pro: Are Low-Rank Adapters Properly Optimized?

Wang, Liang, He, Wang, Tan; 2024, arXiv 2407.18242.

Steps ``g^A``, ``g^B`` of the factors change the weight, to first order, by ``g~ = s (B g^A + g^B A)``. With LoRA's own
gradients ``g_A = s B^T G``, ``g_B = s G A^T`` this is not the nearest to the weight's gradient G that a pair can make.
The nearest, over all ``g^A`` and ``g^B``, is

    g^A = (B^T B)^-1 g_A / s^2 + X A
    g^B = (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X          g~ = P_B G + (I - P_B) G P_A

with ``P_A``, ``P_B`` the projections onto A's rows and B's columns. X does not change ``g~``; it is the one with which
the steps stay nearest to LoRA's own, ``||g^A - g_A||^2 + ||g^B - g_B||^2`` smallest: a Sylvester equation of size rank,

    B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2

At the start B is zero, and so is ``g_A``: A then waits, and B takes the step of LoRA-FA. G itself is never formed:
a step costs products of the factors and two decompositions of size rank, in fp64 (fp32 where the device has no
other), with a ridge of 1e-8 of the mean eigenvalue.

Differences from the authors' code:

- Theirs runs Adam on the dense ``g~``, with the optimizer memory of full fine-tuning, and projects its steps back.
  Here the factors' gradients are replaced and the optimizer runs on these: its state stays ``r (d_in + d_out)``
  numbers a moment. With SGD a step is ``g~``; AdamW scales each number of ``g^A`` and ``g^B`` by its own history.
- Theirs has the scale 2 (16 / 8) written in; here it is the adapter's.

While B is small, ``g^A`` is large, about ``|G| / |B|``; ``clip_norm`` acts on these gradients and not on LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.methods.lora import LoRA, LowRankRule, LowRankUpdate
from lorakit.methods.lorafa import ridge_of, wide_dtype
from lorakit.methods.method import Update


class LoRAProRule(LowRankRule):
    """Replaces the gradients of every pair by those whose step is nearest to the weight's own gradient."""

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Replace the gradients; pairs of one rank are solved together."""
        alike: dict[tuple[int, torch.device], list[LowRankUpdate]] = {}
        for update in self.updates.values():
            if isinstance(update, LowRankUpdate) and update.A.grad is not None and update.B.grad is not None:
                alike.setdefault((update.A.shape[-2], update.A.device), []).append(update)
        for updates in alike.values():
            adjust(updates)


class LoRAPro(LoRA):
    """LoRA whose steps are the nearest to the weight's own gradient that a pair can take. Fields as in LoRA."""

    name: ClassVar[str] = "lorapro"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lora-pro": {}}

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> LoRAProRule:
        """Return the rule that replaces the gradients."""
        return LoRAProRule(updates, num_steps)


def adjust(updates: Sequence[LowRankUpdate]) -> None:
    """Replace the gradients of pairs of one rank on one device."""
    small = [_small(update) for update in updates]
    AA, BB, cross = (torch.cat([matrices.flatten(0, -3) for matrices in each]) for each in zip(*small, strict=True))
    inverse_A, inverse_B, X = _solved(AA, BB, cross)
    start = 0
    for update, (own, _, _) in zip(updates, small, strict=True):
        stop = start + own.shape[:-2].numel()
        _replace(update, *(solved[start:stop].view(own.shape) for solved in (inverse_A, inverse_B, X)))
        start = stop


def _small(update: LowRankUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``A A^T``, ``B^T B`` and ``g_A A^T / s^2``, each ``[..., r, r]``, with at least one leading dimension."""
    A, B, gradient_A, _ = _wide(update)
    return A @ A.mT, B.mT @ B, gradient_A @ A.mT / update.scale**2


def _solved(AA: Tensor, BB: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(A A^T)^-1``, ``(B^T B)^-1`` and X, each ``[N, r, r]``, from the eigenvectors of both."""
    values_A, vectors_A = torch.linalg.eigh(AA)
    values_B, vectors_B = torch.linalg.eigh(BB)
    values_A = values_A.clamp_min(0.0) + ridge_of(AA)
    values_B = values_B.clamp_min(0.0) + ridge_of(BB)
    inverse_A = (vectors_A / values_A[..., None, :]) @ vectors_A.mT
    inverse_B = (vectors_B / values_B[..., None, :]) @ vectors_B.mT
    right = vectors_B.mT @ (inverse_B @ cross) @ vectors_A
    X = -vectors_B @ (right / (values_B[..., :, None] + values_A[..., None, :])) @ vectors_A.mT
    return inverse_A, inverse_B, X


def _replace(update: LowRankUpdate, inverse_A: Tensor, inverse_B: Tensor, X: Tensor) -> None:
    """Put ``g^A`` and ``g^B`` in the place of a pair's gradients."""
    A, B, gradient_A, gradient_B = _wide(update)
    assert update.A.grad is not None
    assert update.B.grad is not None
    square = update.scale**2
    step_A = inverse_B @ gradient_A / square + X @ A
    outside = gradient_B - B @ (inverse_B @ (B.mT @ gradient_B))
    step_B = outside @ inverse_A / square - B @ X
    update.A.grad.copy_(step_A.view_as(update.A))
    update.B.grad.copy_(step_B.view_as(update.B))


def _wide(update: LowRankUpdate) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors that stand beside each other's steps, and their gradients, ``[N, ...]`` in fp64.

    With an offset the parameters are differences: A's gradient is ``s (B0 + B)^T G``.
    """
    A = update.A if update.A0 is None else update.A0 + update.A
    B = update.B if update.B0 is None else update.B0 + update.B
    assert update.A.grad is not None
    assert update.B.grad is not None
    tensors = (tensor.detach().to(wide_dtype(tensor)) for tensor in (A, B, update.A.grad, update.B.grad))
    A, B, gradient_A, gradient_B = (tensor[None] if tensor.dim() == 2 else tensor for tensor in tensors)
    return A, B, gradient_A, gradient_B
