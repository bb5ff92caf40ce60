"""Parts of a fused projection: an update of chosen rows of a matrix, such as q and v of a packed qkv.

Each part is a place of its own, ``h.0.attn.c_attn[q]``, with its own pair: ``B[rows of q, rank]``. The
other rows of the layer's output keep the base's bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lorakit.layers.embedding import EmbeddingOps
from lorakit.layers.ops import BranchOps, LayerOps, Runs, WeightOps, num_rows
from lorakit.layers.token_part import TokenPart


class _Rows:
    """Rows of a matrix, in order, along one dimension of a tensor.

    Runs of one length at one distance, as q's rows of every head are, are a rectangle of the dimension
    seen as ``[runs, distance]``: a view, where an index would gather and scatter. Other runs go by index.
    Dimensions are counted from the end.
    """

    def __init__(self, runs: Runs) -> None:
        self.num_runs = len(runs)
        self.start, stop = runs[0]
        self.length = stop - self.start
        self.index = torch.cat([torch.arange(start, stop) for start, stop in runs])
        distances = {later[0] - earlier[0] for earlier, later in itertools.pairwise(runs)}
        equal = all(stop - start == self.length for start, stop in runs)
        self.distances = distances if equal else None

    def take(self, values: Tensor, dim: int) -> Tensor:
        if not self._is_grid(values.shape[dim]):
            return values.index_select(dim, self.index.to(values.device))
        return self._grid(values, dim).narrow(dim, self.start, self.length).flatten(dim - 1, dim)

    def put(self, values: Tensor, dim: int, rows: Tensor) -> Tensor:
        if not self._is_grid(values.shape[dim]):
            return values.index_copy(dim, self.index.to(values.device), rows)
        own = self._grid(rows, dim)
        changed = self._grid(values, dim).slice_scatter(own, dim, self.start, self.start + self.length)
        return changed.flatten(dim - 1, dim)

    def add(self, values: Tensor, dim: int, rows: Tensor) -> Tensor:
        """Return a copy of ``values`` with ``rows`` added: the gradient passes to ``values`` as it is."""
        if not self._is_grid(values.shape[dim]):
            return values.index_add(dim, self.index.to(values.device), rows)
        total = values.clone(memory_format=torch.contiguous_format)
        self._grid(total, dim).narrow(dim, self.start, self.length).add_(self._grid(rows, dim))
        return total

    def alone(self, rows: Tensor, dim: int, size: int) -> Tensor:
        shape = list(rows.shape)
        shape[dim] = size
        return self.put(rows.new_zeros(shape), dim, rows)

    def _is_grid(self, size: int) -> bool:
        """Tell whether the runs repeat over the whole of a dimension of this size."""
        return self.distances is not None and self.distances <= {size / self.num_runs}

    def _grid(self, values: Tensor, dim: int) -> Tensor:
        grid: Tensor = torch.unflatten(values, dim, (self.num_runs, -1))
        return grid


def part_of(ops: LayerOps, runs: Runs) -> LayerOps:
    """Return the ops of some rows of the matrix that ``ops`` describes, or of some tokens of an embedding."""
    if isinstance(ops, EmbeddingOps):
        return TokenPart(ops, runs)
    return WeightPart(ops, runs) if isinstance(ops, WeightOps) else BranchPart(ops, runs)


class _Part(LayerOps):
    """What both ways of computing share: the matrix and bias are the inner ones' rows."""

    def __init__(self, inner: LayerOps, runs: Runs) -> None:
        super().__init__(inner.parameter, inner.bias_parameter)
        self.inner = inner
        self.runs = runs
        self.rows = _Rows(runs)
        self.kind = inner.kind  # type: ignore[misc]
        self.input_is_index = inner.input_is_index  # type: ignore[misc]
        self.matrix_input = inner.matrix_input  # type: ignore[misc]
        self.is_attention = inner.is_attention  # type: ignore[misc]

    @override
    def bias(self, layer: nn.Module) -> Tensor | None:
        bias = self.inner.bias(layer)
        return None if bias is None else self.rows.take(bias, -1)

    @override
    def stack(self, layer: nn.Module) -> tuple[int, ...]:
        return self.inner.stack(layer)

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        return num_rows(self.runs), self.inner.matrix_shape(layer, weight_shape)[1]

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return self.rows.take(self.inner.as_matrix(layer, weight), -2)

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """Return the native shape with zeros in all other rows."""
        return self.inner.as_weight(layer, self.rows.alone(matrix, -2, self.inner.dims(layer)[0]))

    @override
    def as_bias(self, layer: nn.Module, values: Tensor) -> Tensor:
        return self.rows.alone(values, -1, self.inner.dims(layer)[0])

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        return self.inner.positions(layer, x)


class BranchPart(_Part, BranchOps):
    """Rows of a layer whose update is a product beside it."""

    inner: BranchOps

    @override
    def down(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        return self.inner.down(layer, x, A, like)

    @override
    def dropped_down(
        self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor, p: float, seed: int | None = None
    ) -> Tensor:
        return self.inner.dropped_down(layer, x, A, like, p, seed)

    @override
    def product(self, layer: nn.Module, x: Tensor, D: Tensor, like: Tensor) -> Tensor:
        return self.inner.product(layer, x, D, like)

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        if self.inner.channels_last:
            return self.inner.up(layer, h, B)
        # Which ranks a channel of a grouped convolution reads depends on its place among all of them.
        every = self.inner.up(layer, h, self.rows.alone(B, -2, self.inner.dims(layer)[0]))
        return self.narrow(layer, every)

    @override
    def accumulate(self, layer: nn.Module, out: Tensor, h: Tensor, B: Tensor, factor: float) -> Tensor:
        return self.rows.add(out, self._channels(layer), self.up(layer, h * factor, B).to(out.dtype))

    @override
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return self.inner.channelwise(layer, values)

    @override
    def rankwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        return self.inner.rankwise(layer, values)

    @override
    def narrow(self, layer: nn.Module, out: Tensor) -> Tensor:
        return self.rows.take(out, self._channels(layer))

    @override
    def widen(self, layer: nn.Module, out: Tensor, narrow: Tensor) -> Tensor:
        return self.rows.put(out, self._channels(layer), narrow)

    def _channels(self, layer: nn.Module) -> int:
        """Return the dimension of the output, from the end, that holds the channels."""
        return -self.inner.channelwise(layer, torch.empty(1)).dim()


class WeightPart(_Part, WeightOps):
    """Rows of a weight that the layer itself multiplies by."""

    inner: WeightOps
