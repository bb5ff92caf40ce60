"""LoRA-FA: LoRA with a frozen A, and its exact gradient.

Zhang, Zhang, Shi, Chu, Li; 2023, arXiv 2308.03303: A keeps its random start and only B is trained. The backward pass
of B needs ``A x`` of each token, ``rank`` numbers, and not ``x``. The paper's second version corrects the step: of all
updates ``s g A`` with the frozen A, the one nearest to the weight's own gradient ``G`` has

    g = g_B (A A^T)^-1 / s^2,     g_B = s G A^T        minimises  || s g A - G ||_F

so ``s g A`` is G projected onto A's rows. ``A A^T`` gets a ridge of 1e-8 times its mean eigenvalue; its inverse is
found once, in fp64, as A never changes. With Adam the factor ``1 / s^2`` is of no account, and a random A has
nearly orthogonal rows: there the correction does little. It does more where A's rows differ in size or
direction (PiSSA, an A from data).

What is kept for the backward pass beside the base's own:

- linear layers and transposed ones, fp32: ``tokens * rank * 4`` bytes;
- embeddings: nothing; the frozen factor is B (``B ~ N(0, 1)``) and the trained one A, which starts at zero. With
  the random factor frozen an update keeps a ``rank / width`` share of the gradient, which with a frozen
  look-up table would be ``rank / vocabulary``;
- convolutions: ``positions * rank * 4`` bytes, but torch keeps their input for the base too;
- with dropout the mask as well, as large as the input: a saving needs ``dropout=0``;
- attention, recurrent layers and experts run with the updated weight, whose gradient needs the input: nothing is saved.

Checkpointed activations are not kept anyway. At one rank and one learning rate LoRA-FA trains about half as many
numbers as LoRA and is behind it; compare at several rates.

Differences from PEFT's optimizer: the inverse is not computed anew in each step; the factors are told apart by
name and not by their order; fp64 and not the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.layers import Site
from lorakit.methods.lora import LoRA, LowRankUpdate
from lorakit.methods.method import Update
from lorakit.methods.rule import Rule

RIDGE = 1e-8
"""Added to a Gram matrix's diagonal, in units of its mean eigenvalue: below it directions count as missing."""

_SMALLEST = 1e-30


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for small systems of equations: fp64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def ridge_of(gram: Tensor) -> Tensor:
    """Return what to add to the eigenvalues of ``gram[..., r, r]``, ``[..., 1]``; positive also where all are zero."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
    return (RIDGE * mean).clamp_min(_SMALLEST)


def inverse_gram(rows: Tensor) -> Tensor:
    """Return ``(R R^T + ridge)^-1``, ``[..., r, r]`` in fp64, of ``rows[..., r, n]``."""
    rows = rows.detach().to(wide_dtype(rows))
    gram = rows @ rows.mT
    inverse: Tensor = torch.linalg.inv(gram + torch.diag_embed(ridge_of(gram).expand(gram.shape[:-1])))
    return inverse


class LoRAFAUpdate(LowRankUpdate):
    """A pair of which one factor is trained; the other is a buffer.

    A start that is to keep the function needs no offset here: with A frozen at ``A0``, the difference
    ``B A0 - B0 A0`` is ``(B - B0) A0``, a pair of the same rank that starts at zero.

    Attributes:
        frozen: the name of the factor that is not trained: 'A', for an embedding 'B'.
    """

    def __init__(
        self, A: Tensor, B: Tensor, scale: float, dropout: float, bias: Tensor | None, offset: bool, frozen: str
    ) -> None:
        if offset:
            A, B = (A, torch.zeros_like(B)) if frozen == "A" else (torch.zeros_like(A), B)
        super().__init__(A, B, scale, dropout, bias)
        self.frozen = frozen
        kept: Tensor = getattr(self, frozen).detach()
        delattr(self, frozen)
        self.register_buffer(frozen, kept)

    @property
    def trained(self) -> Tensor:
        """The factor that is trained."""
        return self.A if self.frozen == "B" else self.B


class LoRAFARule(Rule):
    """Turns the trained factors' gradients into the steps nearest to the weights' own gradients."""

    def __init__(self, updates: Mapping[str, Update], num_steps: int, corrected: bool) -> None:
        super().__init__(updates, num_steps)
        self.corrected = corrected
        self._inverses: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Replace ``g_B`` by ``g_B (A A^T)^-1 / s^2`` (an embedding's ``g_A`` by ``(B^T B)^-1 g_A / s^2``)."""
        for path, update in self.updates.items():
            if not self.corrected or not isinstance(update, LoRAFAUpdate) or update.trained.grad is None:
                continue
            if path not in self._inverses:
                self._inverses[path] = inverse_gram(update.A if update.frozen == "A" else update.B.mT) / update.scale**2
            gradient, inverse = update.trained.grad, self._inverses[path]
            wide = gradient.to(inverse.dtype)
            gradient.copy_(wide @ inverse if update.frozen == "A" else inverse @ wide)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Forget the inverses: the frozen factors have been loaded since."""
        self._inverses.clear()


class LoRAFA(LoRA):
    """LoRA with a frozen A: half the numbers, and activations of size rank. Fields as in LoRA, and one more.

    Attributes:
        corrected: step along the weight's own gradient, as far as the frozen A allows; False for the first version's
            plain gradient of B.
    """

    name: ClassVar[str] = "lorafa"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lora-fa": {}}

    corrected: bool = True

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None) -> LoRAFAUpdate:
        """Make the update of one site."""
        A, B, bias = self.start(site, generator, dtype, seen)
        frozen = "B" if site.ops.input_is_index else "A"
        return LoRAFAUpdate(A, B, self.scale_at(site.path), self.dropout, bias, self.init.shifts, frozen)

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> LoRAFARule:
        """Return the rule with the corrected gradient."""
        return LoRAFARule(updates, num_steps, self.corrected)
