"""``nn.Linear``: ``y = x W^T + b`` with ``W[d_out, d_in]``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.layers.ops import BranchOps, flat_positions


class LinearOps(BranchOps):
    """The weight already is the matrix."""

    kind = "linear"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear",)
    matrix_input = True

    @override
    def down(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        return F.linear(x, A)

    @override
    def product(self, layer: nn.Module, x: Tensor, D: Tensor, like: Tensor) -> Tensor:
        return F.linear(x, D)

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    @override
    def accumulate(self, layer: nn.Module, out: Tensor, h: Tensor, B: Tensor, factor: float) -> Tensor:
        flat = torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=factor)
        return flat.view(out.shape)

    @override
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return values

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        return flat_positions(x.shape, 1)
