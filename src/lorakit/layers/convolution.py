"""``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``: the matrix is the kernel, all but its first dimension flattened.

    W[c_out, c_in / groups * k_1 * ... * k_n],      B[c_out, rank],   A[rank, c_in / groups * k_1 * ... * k_n]

Down is a convolution with the host's own stride, padding, padding mode and dilation into ``rank``
channels, up a 1x1 convolution: PEFT's parametrisation for ``groups=1``. loralib's, whose blocks give rank
``rank * k``, is another one.

With groups the update is of that same matrix, so that it merges for any rank: every group's inputs go
through the one A, and each output channel reads its own group's ``rank`` channels. PEFT's files for
grouped convolutions hold another update, which has no merged weight.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.layers.ops import BranchOps, flat_positions, host_class

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvolutionOps(BranchOps):
    """What all convolutions share; ``num_dims`` are the dimensions that the kernel moves over."""

    num_dims: int
    channels_last = False

    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse a subclass that inherits torch's forward and convolves otherwise below it."""
        own = getattr(host_class(layer), "_conv_forward", None)
        return None if own is None or own.__module__ == nn.modules.conv.__name__ else "its _conv_forward is its own"

    @override
    def down(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        groups = _groups(layer)
        if groups == 1:
            return self.into_rank(layer, x, A, like)
        trailing = self.num_dims
        leading, sizes = x.shape[: -trailing - 1], x.shape[-trailing:]
        h = self.into_rank(layer, x.reshape(-1, x.shape[-trailing - 1] // groups, *sizes), A, like)
        return h.reshape(*leading, groups * A.shape[0], *h.shape[-trailing:])

    def into_rank(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        """Convolve one group's inputs (or all inputs, without groups) with A as a kernel."""
        assert isinstance(layer, nn.modules.conv._ConvNd)
        kernel = A.view(A.shape[0], -1, *layer.kernel_size)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = (0,) * self.num_dims
        out: Tensor = CONVOLVE[self.num_dims](x, kernel, None, layer.stride, padding, layer.dilation)
        return out

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        kernel = B.reshape(*B.shape, *(1,) * self.num_dims)
        out: Tensor = CONVOLVE[self.num_dims](h, kernel, groups=_groups(layer))
        return out

    @override
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * self.num_dims)

    @override
    def rankwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return self.channelwise(layer, values.repeat(_groups(layer)))

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        return flat_positions(x.shape, self.num_dims + 1)


def _groups(layer: nn.Module) -> int:
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.groups


class Conv1dOps(ConvolutionOps):
    """Kernels that move along one dimension."""

    kind = "conv1d"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.conv.Conv1d",)
    num_dims = 1


class Conv2dOps(ConvolutionOps):
    """Kernels that move along two dimensions."""

    kind = "conv2d"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.conv.Conv2d",)
    num_dims = 2


class Conv3dOps(ConvolutionOps):
    """Kernels that move along three dimensions."""

    kind = "conv3d"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.conv.Conv3d",)
    num_dims = 3
