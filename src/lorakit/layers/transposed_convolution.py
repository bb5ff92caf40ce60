"""``nn.ConvTranspose1d``, ``2d``, ``3d``: the weight is stored as ``[c_in, c_out / groups, k_1, ..., k_n]``.

The matrix has a row for each output channel, ``[c_out, c_in / groups * k_1 * ... * k_n]``, as that of a
convolution: down is the host's own transposed convolution into ``rank`` channels, up a 1x1 convolution.
"""

from __future__ import annotations

import math
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.layers.convolution import ConvolutionOps

CONVOLVE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class TransposedConvolutionOps(ConvolutionOps):
    """Stride, padding, output padding (also by ``output_size``), dilation and groups are the host's."""

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        groups = _own(layer).groups
        return weight_shape[1] * groups, weight_shape[0] // groups * math.prod(weight_shape[2:])

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        groups, (c_in, c_out) = _own(layer).groups, weight.shape[:2]
        grouped = weight.reshape(groups, c_in // groups, c_out, -1).transpose(1, 2)
        return grouped.reshape(groups * c_out, -1)

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        shape, groups = self.weight(layer).shape, _own(layer).groups
        grouped = matrix.reshape(groups, shape[1], shape[0] // groups, -1).transpose(1, 2)
        return grouped.reshape(shape)

    @override
    def into_rank(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        host = _own(layer)
        kernel = A.view(A.shape[0], -1, *host.kernel_size).transpose(0, 1)
        out: Tensor = CONVOLVE[self.num_dims](
            x,
            kernel,
            None,
            host.stride,
            cast(tuple[int, ...], host.padding),
            self._output_padding(host, x, like),
            1,
            host.dilation,
        )
        return out

    def _output_padding(self, host: nn.modules.conv._ConvTransposeNd, x: Tensor, like: Tensor) -> list[int]:
        """Return what was added to the output's size, from that size itself: a call may choose it."""
        n = self.num_dims
        padding = cast(tuple[int, ...], host.padding)
        taken = zip(x.shape[-n:], host.stride, padding, host.dilation, host.kernel_size, strict=True)
        plain = [(size - 1) * stride - 2 * pad + step * (k - 1) + 1 for size, stride, pad, step, k in taken]
        return [found - size for found, size in zip(like.shape[-n:], plain, strict=True)]


def _own(layer: nn.Module) -> nn.modules.conv._ConvTransposeNd:
    assert isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return layer


class ConvTranspose1dOps(TransposedConvolutionOps):
    """Kernels that move along one dimension."""

    kind = "conv_transpose1d"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.conv.ConvTranspose1d",)
    num_dims = 1


class ConvTranspose2dOps(TransposedConvolutionOps):
    """Kernels that move along two dimensions."""

    kind = "conv_transpose2d"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.conv.ConvTranspose2d",)
    num_dims = 2


class ConvTranspose3dOps(TransposedConvolutionOps):
    """Kernels that move along three dimensions."""

    kind = "conv_transpose3d"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.conv.ConvTranspose3d",)
    num_dims = 3
