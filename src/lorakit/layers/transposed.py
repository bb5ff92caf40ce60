"""GPT-2's ``Conv1D`` of transformers: a linear layer whose weight is stored as ``[d_in, d_out]``."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lorakit.layers.linear import LinearOps


class TransposedLinearOps(LinearOps):
    """As :class:`LinearOps` on the transposed weight (PEFT's ``fan_in_fan_out``)."""

    kind = "transposed"
    hosts: ClassVar[tuple[str, ...]] = ("transformers.pytorch_utils.Conv1D",)

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        d_in, d_out = weight_shape
        return d_out, d_in

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.t()
