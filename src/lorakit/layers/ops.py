"""``LayerOps``: what a method needs to know about a kind of layer, and the registry of kinds.

A method speaks matrices, ``A[rank, d_in]`` and ``B[d_out, rank]``. A ``LayerOps`` says how one kind
of layer multiplies by them and how its weight looks as ``[d_out, d_in]``. The file is the registry:
every module of this package that defines a subclass is found, no list is kept.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import UnsupportedLayerError


class LayerOps(ABC):
    """The stateless operations of one kind of layer.

    Attributes:
        kind: short name, as saved with an adapter and shown in listings.
        hosts: qualified names of the classes whose ``forward`` these ops describe. A subclass is
            covered only if it inherits that very ``forward``.
        input_is_index: the layer looks rows up instead of multiplying (embeddings).
        matrix_input: the layer is a plain matrix product on the last dimension, so it counts as
            'linear' for the target words.
    """

    kind: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]]
    input_is_index: ClassVar[bool] = False
    matrix_input: ClassVar[bool] = False

    def refusal(self, layer: nn.Module) -> str | None:
        """Return why this layer's own options cannot be adapted, or None where they can."""
        return None

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the layer's weight, dense, in its native shape."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def bias(self, layer: nn.Module) -> Tensor | None:
        """Return the layer's bias, ``[d_out]``, or None."""
        bias = getattr(layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def dims(self, layer: nn.Module) -> tuple[int, int]:
        """Return ``(d_out, d_in)`` of the weight as a matrix."""
        shape = self.matrix_shape(tuple(self.weight(layer).shape))
        return shape

    @abstractmethod
    def matrix_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        """Return ``(d_out, d_in)`` of a weight with this native shape."""

    @abstractmethod
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Turn a weight (or its gradient) from native shape into ``[d_out, d_in]``; no copy where it can."""

    @abstractmethod
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """Turn ``[d_out, d_in]`` into the native shape; inverse of :meth:`as_matrix`."""

    @abstractmethod
    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Map the layer's input into rank space: ``A x``; channels stand where the layer's outputs have them."""

    def dropped_down(self, layer: nn.Module, x: Tensor, A: Tensor, p: float) -> Tensor:
        """Map the input into rank space with dropout of probability ``p`` on the input."""
        return self.down(layer, F.dropout(x, p, training=True), A)

    @abstractmethod
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        """Map rank space to the layer's output: ``B h``."""

    def accumulate(self, layer: nn.Module, out: Tensor, h: Tensor, B: Tensor, factor: float) -> Tensor:
        """Return ``out + factor * B h`` in ``out``'s dtype, as a new tensor."""
        return out + self.up(layer, h * factor, B).to(out.dtype)

    @abstractmethod
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        """Shape ``[channels]`` so that it broadcasts over an output (or a rank-space tensor)."""

    @abstractmethod
    def positions(self, layer: nn.Module, x: Tensor) -> tuple[int, ...]:
        """Return the leading shape of the input whose entries each become one output vector or map."""


def host_class(layer: nn.Module) -> type[nn.Module]:
    """Return the layer's own class, looking through the class that attaching put on top of it."""
    for kind in type(layer).__mro__:
        if not kind.__dict__.get("_lorakit_adapted", False) and issubclass(kind, nn.Module):
            return kind
    raise AssertionError("an adapted layer always has a host class")


def find_ops(layer: nn.Module) -> LayerOps | None:
    """Return the ops of the class whose ``forward`` really runs in this layer, or None."""
    forward = host_class(layer).forward
    return _registry().get(f"{forward.__module__}.{getattr(forward, '__qualname__', '')}")


def ops_for(path: str, layer: nn.Module) -> LayerOps:
    """Return the ops for the layer at ``path``.

    Raises:
        UnsupportedLayerError: no ops cover this kind of layer or its options.
    """
    ops = find_ops(layer)
    kind = host_class(layer)
    if ops is None:
        known = ", ".join(supported_kinds())
        relative = next(
            (base for base in kind.__mro__[1:] if f"{base.__module__}.{base.__qualname__}" in _host_names()),
            None,
        )
        why = f", a {relative.__name__} with a forward of its own" if relative is not None else ""
        raise UnsupportedLayerError(
            f"layer '{path}' is a {kind.__name__}{why}: it cannot be adapted. Supported: {known}."
        )
    refusal = ops.refusal(layer)
    if refusal is not None:
        raise UnsupportedLayerError(f"layer '{path}' ({kind.__name__}) cannot be adapted: {refusal}.")
    return ops


def ops_of_kind(kind: str) -> LayerOps:
    """Return the ops with this ``kind``.

    Raises:
        UnsupportedLayerError: no such kind.
    """
    for ops in _registry().values():
        if ops.kind == kind:
            return ops
    raise UnsupportedLayerError(f"no layer kind '{kind}'. Supported: {', '.join(supported_kinds())}.")


def supported_kinds() -> list[str]:
    """Return the names of the host classes that can be adapted."""
    return sorted(name.rsplit(".", 1)[1] for name in _host_names())


def _host_names() -> frozenset[str]:
    return frozenset(host for ops in _registry().values() for host in ops.hosts)


@functools.cache
def _registry() -> dict[str, LayerOps]:
    import lorakit.layers as package

    found: dict[str, LayerOps] = {}
    for module in pkgutil.iter_modules(package.__path__, "lorakit.layers."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, LayerOps) and not inspect.isabstract(kind):
                found.update({f"{host}.forward": kind() for host in kind.hosts})
    return found


def flat_positions(shape: torch.Size, trailing: int) -> tuple[int, ...]:
    """Return ``shape`` without its last ``trailing`` dimensions."""
    return tuple(shape[: len(shape) - trailing])
