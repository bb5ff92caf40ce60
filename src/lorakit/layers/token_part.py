"""Some tokens of an embedding: columns of its matrix ``[d_out, vocabulary]``, rows of its table.

Each input outside these tokens gets zero, so that neither forward nor backward ever sees the whole table.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.layers.embedding import EmbeddingOps
from lorakit.layers.ops import BranchOps, Runs, num_rows


class TokenPart(BranchOps):
    """Tokens of an embedding, as an embedding of a smaller vocabulary; no low-rank update acts on them."""

    takes_dropout: ClassVar[bool] = False

    def __init__(self, inner: EmbeddingOps, runs: Runs) -> None:
        super().__init__(inner.parameter, inner.bias_parameter)
        self.inner = inner
        self.runs = runs
        self.tokens = torch.cat([torch.arange(start, stop) for start, stop in runs])
        self.kind = inner.kind  # type: ignore[misc]
        self.input_is_index = True  # type: ignore[misc]

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        return self.inner.matrix_shape(layer, weight_shape)[0], num_rows(self.runs)

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        whole = self.inner.as_matrix(layer, weight)
        if len(self.runs) == 1:
            return whole.narrow(-1, self.runs[0][0], num_rows(self.runs))
        return whole.index_select(-1, self.tokens.to(whole.device))

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """Return the native shape with zeros at all other tokens."""
        whole = matrix.new_zeros(self.inner.dims(layer))
        return self.inner.as_weight(layer, whole.index_copy(-1, self.tokens.to(matrix.device), matrix))

    @override
    def down(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        """Look up the columns of A that belong to the input's tokens, zero for every other token."""
        table = torch.cat([A.t(), A.new_zeros(1, A.shape[0])])
        return F.embedding(self._numbers(x), table)

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return self.inner.up(layer, h, B)

    @override
    def product(self, layer: nn.Module, x: Tensor, D: Tensor, like: Tensor) -> Tensor:
        return self.inner.scaled(layer, self.down(layer, x, D, like))

    @override
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return self.inner.channelwise(layer, values)

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        return self.inner.positions(layer, x)

    def _numbers(self, x: Tensor) -> Tensor:
        """Number each input among these tokens; every other token has the number behind the last."""
        count = num_rows(self.runs)
        if len(self.runs) == 1:
            start, stop = self.runs[0]
            return torch.where((x >= start) & (x < stop), x - start, count)
        tokens = self.tokens.to(x.device)
        place = torch.bucketize(x, tokens).clamp(max=count - 1)
        return torch.where(tokens[place] == x, place, count)
