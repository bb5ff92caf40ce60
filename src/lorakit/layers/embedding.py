"""``nn.Embedding``: a product with a one-hot input, ``W[d_out, d_in]`` = the table transposed.

``d_in`` is the vocabulary, ``d_out`` the width. Dropout on a one-hot input keeps or drops a token's
whole update, scaled by ``1 / (1 - p)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.kernels.dropout import dropped
from lorakit.layers.ops import BranchOps


class EmbeddingOps(BranchOps):
    """Down is a look-up in A's columns, up a product."""

    kind = "embedding"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.sparse.Embedding",)
    input_is_index = True

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse ``max_norm``, which rewrites the base weight in every forward."""
        if getattr(layer, "max_norm", None) is not None:
            return "max_norm rewrites the base weight in every forward"
        return None

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        vocabulary, width = weight_shape
        return width, vocabulary

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.t()

    @override
    def down(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        assert isinstance(layer, nn.Embedding)
        return F.embedding(x, A.t(), padding_idx=layer.padding_idx)

    @override
    def dropped_down(
        self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor, p: float, seed: int | None = None
    ) -> Tensor:
        ones = torch.ones(x.shape, dtype=A.dtype, device=A.device)
        keep = F.dropout(ones, p, training=True) if seed is None else dropped(ones, p, seed)
        return self.down(layer, x, A, like) * keep[..., None]

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    @override
    def product(self, layer: nn.Module, x: Tensor, D: Tensor, like: Tensor) -> Tensor:
        return self.scaled(layer, self.down(layer, x, D, like))

    def scaled(self, layer: nn.Module, found: Tensor) -> Tensor:
        """Multiply what was looked up by the layer's own constant, where it has one."""
        return found

    @override
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return values

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        return tuple(x.shape)
