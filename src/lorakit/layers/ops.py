"""``LayerOps``: what a method needs to know about a kind of layer, and the registry of kinds.

A method speaks matrices, ``A[rank, d_in]`` and ``B[d_out, rank]``. A ``LayerOps`` says how one weight of
one kind of layer looks as ``[d_out, d_in]``, and how the layer is made to compute with an update of it:

    BranchOps   the update's product is added to the layer's output (linear, embedding, convolution)
    WeightOps   the layer runs with the updated weight in its own's place (attention, recurrent, experts)

A layer with several weights has one place for each: ``lstm.weight_ih_l0``. The file is the registry:
every module of this package that defines a subclass is found, no list is kept.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lorakit.errors import UnsupportedLayerError, quoted
from lorakit.kernels.dropout import dropped

Runs = tuple[tuple[int, int], ...]
Forward = Callable[..., Any]


class LayerOps(ABC):
    """The stateless operations of one weight of one kind of layer.

    The matrix is the weight itself, all but its first dimension flattened, where a kind does not say otherwise.
    Matrices carry the leading dimension ``[E]`` where the weight is a stack of ``E`` matrices (experts).

    Attributes:
        kind: short name, as saved with an adapter and shown in listings.
        hosts: qualified names of the classes whose ``forward`` these ops describe. A subclass is
            covered only if it inherits that very ``forward``.
        parameter: name of the weight below the layer; ``bias_parameter`` of the bias that belongs to it.
        input_is_index: the layer looks rows up instead of multiplying (embeddings).
        matrix_input: the layer multiplies vectors by matrices, so it counts for the target words.
        is_attention: it does so inside an attention of its own, whatever it is called.
        takes_dropout: whether the update's own input can be dropped.
    """

    kind: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]] = ()
    input_is_index: ClassVar[bool] = False
    matrix_input: ClassVar[bool] = False
    is_attention: ClassVar[bool] = False
    takes_dropout: ClassVar[bool] = True

    def __init__(self, parameter: str = "weight", bias_parameter: str = "bias") -> None:
        self.parameter = parameter
        self.bias_parameter = bias_parameter

    @classmethod
    def covers(cls, kind: type[nn.Module]) -> bool:
        """Tell whether these ops describe a class that ``hosts`` does not name."""
        return False

    def refusal(self, layer: nn.Module) -> str | None:
        """Return why this layer's own options cannot be adapted, or None where they can."""
        return None

    def places(self, layer: nn.Module) -> Mapping[str, LayerOps]:
        """Return the layer's weights that can be updated: ops by name; one without a name is the only one."""
        return {"": self}

    def parts(self, layer: nn.Module) -> Mapping[str, Runs]:
        """Return which rows of the matrix are which part of a fused projection, where the layer itself says."""
        return {}

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the layer's weight, dense, in its native shape."""
        weight = _below(layer, self.parameter)
        assert weight is not None
        return weight

    def bias(self, layer: nn.Module) -> Tensor | None:
        """Return the layer's bias, ``[d_out]``, or None."""
        return _below(layer, self.bias_parameter)

    def dims(self, layer: nn.Module) -> tuple[int, int]:
        """Return ``(d_out, d_in)`` of the weight as a matrix (of each matrix of a stack)."""
        return self.matrix_shape(layer, tuple(self.weight(layer).shape))

    def stack(self, layer: nn.Module) -> tuple[int, ...]:
        """Return ``(E,)`` where the weight is a stack of ``E`` matrices, else ``()``."""
        return ()

    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        """Return ``(d_out, d_in)`` of a weight with this native shape."""
        return weight_shape[0], math.prod(weight_shape[1:])

    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """Turn a weight (or its gradient) from native shape into ``[d_out, d_in]``; no copy where it can."""
        return weight.flatten(1)

    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """Turn ``[d_out, d_in]`` into the native shape; inverse of :meth:`as_matrix`."""
        return matrix.reshape(self.weight(layer).shape)

    def as_bias(self, layer: nn.Module, values: Tensor) -> Tensor:
        """Turn ``[d_out]`` into the shape of the bias."""
        return values

    @abstractmethod
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        """Return the leading shape of the input whose entries each become one output vector or map.

        Raises:
            RoutingError: the input's positions cannot be told apart.
        """


class BranchOps(LayerOps):
    """A layer whose update is a product beside it: ``out = W x + s B (A x)``, without a ``[d_out, d_in]`` matrix.

    Attributes:
        channels_last: the last dimension of an output holds its channels, so that some rows can be updated alone.
    """

    channels_last: ClassVar[bool] = True

    @abstractmethod
    def down(self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor) -> Tensor:
        """Map the layer's input into rank space: ``A x``; channels stand where the layer's outputs have them.

        Args:
            layer: the host.
            x: its input.
            A: ``[rank, d_in]``.
            like: the layer's own output for ``x``.
        """

    def dropped_down(
        self, layer: nn.Module, x: Tensor, A: Tensor, like: Tensor, p: float, seed: int | None = None
    ) -> Tensor:
        """Map the input into rank space with dropout of probability ``p`` on the input, by a seed or drawn anew."""
        x = F.dropout(x, p, training=True) if seed is None else dropped(x, p, seed)
        return self.down(layer, x, A, like)

    @abstractmethod
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        """Map rank space to the layer's output: ``B h``."""

    def product(self, layer: nn.Module, x: Tensor, D: Tensor, like: Tensor) -> Tensor:
        """Multiply the layer's input by a dense matrix: ``D x`` with ``D[d_out, d_in]``, shaped as the output.

        Raises:
            UnsupportedLayerError: this kind of layer has no such product here.
        """
        raise UnsupportedLayerError(f"a {host_class(layer).__name__} takes no dense update.")

    def accumulate(self, layer: nn.Module, out: Tensor, h: Tensor, B: Tensor, factor: float) -> Tensor:
        """Return ``out + factor * B h`` in ``out``'s dtype, as a new tensor."""
        return out + self.up(layer, h * factor, B).to(out.dtype)

    @abstractmethod
    def channelwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        """Shape ``[channels]`` so that it broadcasts over an output."""

    def rankwise(self, layer: nn.Module, values: Tensor) -> Tensor:
        """Shape ``[rank]`` so that it broadcasts over what :meth:`down` returns."""
        return self.channelwise(layer, values)

    def narrow(self, layer: nn.Module, out: Tensor) -> Tensor:
        """Return the channels of an output that the update changes."""
        return out

    def widen(self, layer: nn.Module, out: Tensor, narrow: Tensor) -> Tensor:
        """Return ``out`` with ``narrow`` in place of the channels that :meth:`narrow` returns."""
        return narrow


class WeightOps(LayerOps):
    """A layer that does more than multiply: it runs its own forward with updated weights in its own's place."""

    takes_dropout: ClassVar[bool] = False

    def read_parameters(self, layer: nn.Module) -> list[str]:
        """Return the names of the parameters that updates of this layer take the place of."""
        return [self.parameter]

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse a weight that is computed anew in every forward, in whose place nothing can be put."""
        computed = [name for name in self.read_parameters(layer) if _stands_at(layer, name) is None]
        return f"it computes {quoted(computed)} (a parametrization)" if computed else None

    def run(
        self,
        layer: nn.Module,
        forward: Forward,
        tensors: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call ``forward``, the host's own, while ``tensors`` stand in place of its parameters of these names."""
        originals = {name: _swap(layer, name, tensor) for name, tensor in tensors.items()}
        try:
            return forward(*args, **kwargs)
        finally:
            for name, original in originals.items():
                _swap(layer, name, original)

    def select(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: Tensor, depth: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for some positions only: indices into the first ``depth`` dimensions, flattened."""
        chosen = {key: _rows(value, places, depth) for key, value in kwargs.items()}
        return tuple(_rows(value, places, depth) for value in args), chosen

    def put(self, layer: nn.Module, out: Any, places: Tensor, depth: int, rows: Any) -> Any:
        """Return the output with ``rows`` at the positions that :meth:`select` chose."""
        return with_positions(out, depth, places, rows)

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        return tuple(x.shape[:-1])


def with_rows(out: Tensor, dim: int, places: Tensor, rows: Tensor) -> Tensor:
    """Return ``out`` with other rows at ``places`` of one dimension, as it lies in memory.

    What comes next sums in another order where its input lies otherwise: the rows that are not touched would
    lose their bits there.
    """
    return out.clone().index_copy_(dim, places, rows.to(out.dtype))


def with_positions(out: Tensor, depth: int, places: Tensor, rows: Tensor) -> Tensor:
    """Return ``out`` with other entries at ``places`` of its first ``depth`` dimensions, see :func:`with_rows`."""
    index = torch.unravel_index(places, out.shape[:depth])
    return out.clone().index_put_(index, rows.to(out.dtype))


def _rows(value: Any, places: Tensor, depth: int) -> Any:
    return value.flatten(0, depth - 1).index_select(0, places) if isinstance(value, Tensor) else value


def _below(layer: nn.Module, name: str) -> Tensor | None:
    """Return the tensor of this dotted name, whatever computes it, or None."""
    value: Any = layer
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def _stands_at(layer: nn.Module, name: str) -> Tensor | None:
    """Return the parameter of this dotted name, or None where there is none or something computes it."""
    inner, _, last = name.rpartition(".")
    return layer.get_submodule(inner)._parameters.get(last)


def _swap(layer: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
    """Put a tensor in the place of a parameter and return what stood there."""
    inner, _, last = name.rpartition(".")
    holder = layer.get_submodule(inner)
    original = holder._parameters[last]
    holder._parameters[last] = tensor  # type: ignore[assignment]
    return original


def host_class(layer: nn.Module) -> type[nn.Module]:
    """Return the layer's own class, looking through the class that attaching put on top of it."""
    for kind in type(layer).__mro__:
        if not kind.__dict__.get("_lorakit_adapted", False) and issubclass(kind, nn.Module):
            return kind
    raise AssertionError("an adapted layer always has a host class")


def find_ops(layer: nn.Module) -> LayerOps | None:
    """Return the ops of the class whose ``forward`` really runs in this layer, or None.

    Of a layer with several weights they are the first weight's; :meth:`LayerOps.places` has them all.
    """
    return _ops_of(host_class(layer))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _ops_of(kind: type[nn.Module]) -> LayerOps | None:
    forward = kind.forward
    exact = _registry().get(f"{forward.__module__}.{getattr(forward, '__qualname__', '')}")
    if exact is not None:
        return exact
    return next((ops for ops in _all_ops() if ops.covers(kind)), None)


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
        matrices = [f"{path}.{name}" for name, p in layer._parameters.items() if is_matrix(p)]
        outright = f" Or name its own weights: {quoted(matrices)}." if matrices else ""
        raise UnsupportedLayerError(
            f"layer '{path}' is a {kind.__name__}{why}: it cannot be adapted. Supported: {known}.{outright}"
        )
    refusal = ops.refusal(layer)
    if refusal is not None:
        raise UnsupportedLayerError(f"layer '{path}' ({kind.__name__}) cannot be adapted: {refusal}.")
    return ops


def supported_kinds() -> list[str]:
    """Return the names of the host classes that can be adapted."""
    return sorted(name.rsplit(".", 1)[1] for name in _host_names())


def _host_names() -> frozenset[str]:
    return frozenset(host for ops in _all_ops() for host in ops.hosts)


@functools.cache
def _all_ops() -> tuple[LayerOps, ...]:
    import lorakit.layers as package

    found: dict[type[LayerOps], LayerOps] = {}
    for module in pkgutil.iter_modules(package.__path__, "lorakit.layers."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(kind) or not issubclass(kind, LayerOps) or inspect.isabstract(kind):
                continue
            if "hosts" in kind.__dict__:
                found[kind] = kind()
    return tuple(found.values())


@functools.cache
def _registry() -> dict[str, LayerOps]:
    return {f"{host}.forward": ops for ops in _all_ops() for host in ops.hosts}


def is_matrix(parameter: Tensor | None) -> bool:
    """Tell whether a parameter is a matrix or a stack of them, so that it can be named outright as a target."""
    return parameter is not None and parameter.dim() in (2, 3)


def flat_positions(shape: torch.Size, trailing: int) -> tuple[int, ...]:
    """Return ``shape`` without its last ``trailing`` dimensions."""
    return tuple(shape[: len(shape) - trailing])


def num_rows(runs: Runs) -> int:
    """Return how many rows these runs have together."""
    return sum(stop - start for start, stop in runs)
