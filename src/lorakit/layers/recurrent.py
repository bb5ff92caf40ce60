"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells: every weight matrix is a place of its own.

    weight_ih_l0 [gates * hidden, input]      weight_hh_l0 [gates * hidden, hidden]     of each layer, then ``_reverse``
    weight_hr_l0 [projection, hidden]         where the hidden state is projected
    weight_ih, weight_hh                      of a cell

The rows of all gates are one matrix with one pair.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from lorakit.errors import RoutingError
from lorakit.layers.ops import Forward, LayerOps, WeightOps, host_class, with_rows


class _GatesOps(WeightOps):
    """A weight ``[d_out, d_in]`` that the layer multiplies by itself."""

    matrix_input = True

    def __init__(self, parameter: str = "weight_ih_l0") -> None:
        super().__init__(parameter, parameter.replace("weight_", "bias_"))

    @abstractmethod
    def weights(self, layer: nn.Module) -> list[str]:
        """Return the names of the layer's weight matrices."""

    @override
    def places(self, layer: nn.Module) -> Mapping[str, LayerOps]:
        return {name: type(self)(name) for name in self.weights(layer)}

    @override
    def read_parameters(self, layer: nn.Module) -> list[str]:
        return self.weights(layer)


class RecurrentOps(_GatesOps):
    """Layers that run over a whole sequence."""

    kind = "recurrent"
    hosts: ClassVar[tuple[str, ...]] = (
        "torch.nn.modules.rnn.LSTM",
        "torch.nn.modules.rnn.GRU",
        "torch.nn.modules.rnn.RNN",
    )

    @override
    def weights(self, layer: nn.Module) -> list[str]:
        return [name for name in _own(layer)._flat_weights_names if name.startswith("weight")]

    @override
    def run(
        self,
        layer: nn.Module,
        forward: Forward,
        tensors: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call ``forward`` with other weights; the layer reads them from a list of its own.

        Its forward makes that list anew where a weight has been replaced meanwhile (by unmerging, say), and
        would lose what is put in here: it is brought up to date before.
        """
        host = _own(layer)
        host._update_flat_weights()
        flat = host._flat_weights
        host._flat_weights = [tensors.get(name, own) for name, own in zip(host._flat_weights_names, flat, strict=True)]
        try:
            return forward(*args, **kwargs)
        finally:
            host._flat_weights = flat

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        if isinstance(x, PackedSequence):
            raise RoutingError(
                f"a packed sequence meets a {host_class(layer).__name__}: its rows are woven into each other and "
                "cannot be routed. Pass a padded tensor."
            )
        return (x.shape[_batch_dim(layer)],) if x.dim() == 3 else ()

    @override
    def select(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: Tensor, depth: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        x = given["input"].index_select(_batch_dim(layer), places)
        hx = given.get("hx")
        return (x, None if hx is None else _each(hx, lambda state: state.index_select(1, places))), {}

    @override
    def put(self, layer: nn.Module, out: Any, places: Tensor, depth: int, rows: Any) -> Any:
        (found, states), (own, own_states) = out, rows
        found = with_rows(found, _batch_dim(layer), places, own)
        if isinstance(states, Tensor):
            return found, with_rows(states, 1, places, own_states)
        pairs = zip(states, own_states, strict=True)
        return found, tuple(with_rows(state, 1, places, new) for state, new in pairs)


class CellOps(_GatesOps):
    """One step of a recurrent layer."""

    kind = "recurrent_cell"
    hosts: ClassVar[tuple[str, ...]] = (
        *("torch.nn.modules.rnn.LSTMCell", "torch.nn.modules.rnn.GRUCell"),
        "torch.nn.modules.rnn.RNNCell",
    )

    def __init__(self, parameter: str = "weight_ih") -> None:
        super().__init__(parameter)

    @override
    def weights(self, layer: nn.Module) -> list[str]:
        return ["weight_ih", "weight_hh"]

    @override
    def select(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: Tensor, depth: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        chosen = {k: None if v is None else _each(v, lambda t: t.index_select(0, places)) for k, v in given.items()}
        return (), chosen

    @override
    def put(self, layer: nn.Module, out: Any, places: Tensor, depth: int, rows: Any) -> Any:
        if isinstance(out, Tensor):
            return with_rows(out, 0, places, rows)
        return tuple(with_rows(found, 0, places, new) for found, new in zip(out, rows, strict=True))


def _own(layer: nn.Module) -> nn.RNNBase:
    assert isinstance(layer, nn.RNNBase)
    return layer


def _batch_dim(layer: nn.Module) -> int:
    return 0 if _own(layer).batch_first else 1


def _each(value: Any, change: Any) -> Any:
    return change(value) if isinstance(value, Tensor) else tuple(change(tensor) for tensor in value)
