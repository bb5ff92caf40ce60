"""DoRA: Weight-Decomposed Low-Rank Adaptation.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen; 2024, arXiv 2402.09353.

    W' = m * (W0 + s B A) / ||W0 + s B A||      norm over each output's row, m[d_out] = ||W0|| at the start

The norm is a constant in the backward pass (the paper's section 4.3). It is found without a dense
``[d_out, d_in]`` temporary, from ``||W0||^2`` (kept), ``W0 A^T`` and ``A A^T``:

    ||W0 + s B A||^2 = ||W0||^2 + 2 s <W0 A^T, B> + s^2 <B (A A^T), B>      by rows

Differences from the paper's code: the magnitude scales ``W0 x`` as the base computed it, so dropout
acts on the low-rank branch only and the base's product is never taken a second time; the bias is not
scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.lora import LoRA, LowRankUpdate, is_lora, lora_fields
from lorakit.methods.method import Method


class DoRAUpdate(LowRankUpdate):
    """A low-rank pair and the rows' magnitude; ``base_square`` is ``||W0||^2`` by rows in fp32 (fp64 of fp64)."""

    scales_rows: ClassVar[bool] = True
    base_square: Tensor

    def __init__(
        self, A: Tensor, B: Tensor, scale: float, dropout: float, bias: Tensor | None, offset: bool, W: Tensor
    ) -> None:
        super().__init__(A, B, scale, dropout, bias, offset)
        square = torch.linalg.vector_norm(W, dim=-1, dtype=_wide(W)).square()
        self.register_buffer("base_square", square, persistent=False)
        self.magnitude = nn.Parameter(square.sqrt().to(A.dtype))

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the pair with ``row_scale = magnitude / ||W0 + s B A||``."""
        W = ops.as_matrix(layer, ops.weight(layer).detach())
        A, B = self.factors()
        row_scale = self.magnitude.to(_wide(W)) / self.norm(W, A, B)
        shift = self.bias_shift(ops, layer)
        return Terms(A, B, self.scale, row_scale=row_scale, dropout=self.dropout, bias_shift=shift)

    @torch.no_grad()
    def norm(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return ``||W + s B A||`` by rows, ``[d_out]``, fp32 (fp64 of fp64), without a ``[d_out, d_in]`` temporary."""
        with torch.autocast(W.device.type, enabled=False):
            wide = _wide(W)
            A, B = A.to(wide), B.to(wide) * self.scale
            cross = (W @ A.to(W.dtype).mT).to(wide)
            square = self.base_square.to(wide) + ((2.0 * cross + B @ (A @ A.mT)) * B).sum(dim=-1)
            tiny = torch.finfo(torch.float32).tiny
            return square.clamp_min(tiny).sqrt()


def _wide(W: Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


class DoRA(LoRA):
    """LoRA on the direction of each row, with the row's magnitude trained beside it. Fields as in LoRA."""

    name: ClassVar[str] = "dora"
    peft_tensors: ClassVar[Mapping[str, str]] = {**LoRA.peft_tensors, "magnitude": "lora_magnitude_vector"}

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None) -> DoRAUpdate:
        """Make the update of one site."""
        A, B, bias = self.start(site, generator, dtype, seen)
        return DoRAUpdate(A, B, self.scale_at(site.path), self.dropout, bias, self.init.shifts, site.matrix())

    def to_peft(self) -> dict[str, Any]:
        """Return the fields of PEFT's ``LoraConfig`` with ``use_dora``."""
        return {**super().to_peft(), "use_dora": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method | None:
        """Read a ``LoraConfig`` with DoRA."""
        return cls(**lora_fields(config)) if is_lora(config) and config.get("use_dora") else None
