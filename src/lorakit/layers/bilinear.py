"""``nn.Bilinear``: ``y_o = x1^T W_o x2 + b_o``; the matrix is ``[d_out, in1 * in2]``."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lorakit.layers.ops import WeightOps


class BilinearOps(WeightOps):
    """The layer runs with the updated weight."""

    kind = "bilinear"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Bilinear",)

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        return weight_shape[0], math.prod(weight_shape[1:])

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight(layer).shape)
