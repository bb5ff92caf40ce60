"""``nn.Conv2d``: the matrix is ``[c_out, c_in * k_h * k_w]``, the rank that of this flattening.

Down is a convolution with the host's own stride, padding and dilation into ``rank`` channels, up a
1x1 convolution: PEFT's parametrisation. loralib's, whose blocks give rank ``r * k``, is another one.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.layers.ops import LayerOps


class Conv2dOps(LayerOps):
    """Stride, padding of every mode and dilation are the host's."""

    kind = "conv2d"
    hosts = ("torch.nn.modules.conv.Conv2d",)

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse grouped convolutions."""
        assert isinstance(layer, nn.Conv2d)
        return f"groups={layer.groups}; only groups=1 is supported" if layer.groups != 1 else None

    @override
    def matrix_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        return weight_shape[0], math.prod(weight_shape[1:])

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight(layer).shape)

    @override
    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        assert isinstance(layer, nn.Conv2d)
        kernel = A.view(A.shape[0], layer.in_channels, *layer.kernel_size)
        out: Tensor = layer._conv_forward(x, kernel, None)
        return out

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return F.conv2d(h, B[:, :, None, None])

    @override
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return values[:, None, None]

    @override
    def positions(self, layer: nn.Module, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[:-3])
