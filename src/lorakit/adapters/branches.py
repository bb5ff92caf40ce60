"""The adapters' parts at one host, and what the host computes with them.

One forward, no modes: ``out = base(x)``, then each active adapter adds its difference from that same
output to its positions. A host that does more than multiply (attention, recurrent layers, experts) runs
with the weights that the active adapters make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.adapters.copies import ModuleCopy
from lorakit.adapters.linear_path import fast_output, watch_output
from lorakit.adapters.readers import Readers
from lorakit.adapters.routed import Together, add_together
from lorakit.adapters.routing import Routing
from lorakit.errors import RoutingError
from lorakit.kernels.dropout import draw_seed
from lorakit.layers import BranchOps, LayerOps, Terms, WeightOps, add_update
from lorakit.layers.ops import host_class, with_positions
from lorakit.methods import Selection, Update


@dataclass
class Active(Selection):
    """What acts in a model now; one object is shared by all hosts.

    Attributes:
        strengths: a lasting factor per adapter, 1.0 where none is set.
        routing: who acts on which row or position; None where ``weights`` acts on all.
        merged: the weights hold the updates already, so that hosts add nothing.
        readers: which hosts read the same input.
    """

    strengths: dict[str, float] = field(default_factory=dict)
    routing: Routing | None = None
    merged: bool = False
    readers: Readers = field(default_factory=Readers)

    def acts(self) -> bool:
        """Tell whether any adapter changes what the model computes."""
        if self.merged:
            return False
        return self.routing is not None or any(self.strength(name) != 0.0 for name in self.weights)

    def strength(self, name: str) -> float:
        """Return the adapter's strength on every row, 0.0 where it does not act."""
        if self.merged or self.routing is not None:
            return 0.0
        return self.weights.get(name, 0.0) * self.strengths.get(name, 1.0)


class Updates(nn.Module):
    """One adapter's updates at one host: each with the ops of the weight that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, LayerOps] = {}

    def put(self, place: str, ops: LayerOps, update: Update) -> None:
        """Add the update of one weight (or part of one), by its name at the host."""
        self.ops[place] = ops
        self._modules[place] = update

    def at(self, place: str) -> Update:
        """Return the update at ``place``."""
        return cast(Update, self._modules[place])

    def each(self) -> Iterator[tuple[LayerOps, Update]]:
        """Yield ops and update, in the order they came."""
        for place, update in self._modules.items():
            yield self.ops[place], cast(Update, update)


Branch = Updates | ModuleCopy


class Branches(nn.Module):
    """The adapters' parts at one host, by adapter name."""

    def __init__(self, ops: LayerOps | None, active: Active) -> None:
        super().__init__()
        self.ops = ops
        self.active = active
        self.together = Together()

    def put(self, name: str, branch: ModuleCopy) -> None:
        """Add a copy; any name will do, also one that ``nn.Module`` uses itself ('train')."""
        self._modules[name] = branch

    def put_update(self, name: str, place: str, ops: LayerOps, update: Update) -> None:
        """Add an update of one of the host's weights."""
        cast(Updates, self._modules.setdefault(name, Updates())).put(place, ops, update)

    def drop(self, name: str) -> None:
        """Remove an adapter's part."""
        del self._modules[name]
        self.together.clear()

    def named(self) -> Mapping[str, Branch]:
        """Return the parts by adapter name."""
        return cast("Mapping[str, Branch]", self._modules)

    def replacement(self) -> ModuleCopy | None:
        """Return the one module copy that stands in for the host on all rows, or None."""
        if self.active.merged or self.active.routing is not None or not self._has_copies():
            return None
        acting = self._acting()
        if list(acting.values()) != [1.0]:
            return None
        branch = self._modules[next(iter(acting))]
        return branch if isinstance(branch, ModuleCopy) else None

    def _has_copies(self) -> bool:
        return any(isinstance(branch, ModuleCopy) for branch in self._modules.values())

    def _acting(self) -> dict[str, float]:
        """Return the strength of every adapter here that acts on all rows."""
        strengths = {name: self.active.strength(name) for name in self.active.weights if name in self._modules}
        return {name: strength for name, strength in strengths.items() if strength != 0.0}

    def plain_updates(self) -> Iterator[tuple[Update | None, float]]:
        """Yield what acts on all rows with its strength; None for what is not one update of the whole host."""
        for name, strength in self._acting().items():
            yield self.plain_update(name), strength

    def plain_update(self, name: str) -> Update | None:
        """Return an adapter's update where it is one of the whole host, else None."""
        branch = self._modules[name]
        if not isinstance(branch, Updates) or len(branch.ops) != 1:
            return None
        ((place, ops),) = branch.ops.items()
        return cast("Update", branch._modules[place]) if ops is self.ops else None

    def run(self, host: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the host computes with the adapters that act; ``forward`` is its own."""
        if self.active.merged:
            return forward(*args, **kwargs)
        routing = self.active.routing
        if isinstance(self.ops, WeightOps):
            if routing is not None:
                return self._routed_by_weight(self.ops, routing, host, forward, args, kwargs)
            tensors = self._tensors(host, self._acting())
            return self.ops.run(host, forward, tensors, args, kwargs) if tensors else forward(*args, **kwargs)
        if routing is None:
            if not torch.compiler.is_compiling() and isinstance(x := _input(args, kwargs), Tensor):
                self.active.readers.enter(host, x)
            if (found := fast_output(self, host, args, kwargs)) is not None:
                return found
        base_out = forward(*args, **kwargs)
        if routing is not None:
            return self._routed(routing, host, base_out, args, kwargs)
        out = base_out
        for name, weight in self._acting().items():
            out = self._add(name, host, base_out, out, args, kwargs, weight)
        watch_output(self, host, out)
        return out

    def _seed(self) -> int:
        """Return a seed of dropout: the input's, or of rows that are routed, a new one."""
        return self.active.readers.seed() if self.active.routing is None else draw_seed()

    def _add(
        self,
        name: str,
        host: nn.Module,
        base_out: Any,
        out: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weight: float,
    ) -> Any:
        branch = self._modules[name]
        if isinstance(branch, ModuleCopy):
            own = branch.in_place_of(host, args, kwargs)
            if not isinstance(own, Tensor) or own.shape != base_out.shape:
                raise _only_alone(name, host, "its output is no single tensor, or of another shape than the base's")
            return out + weight * (own - base_out)
        assert isinstance(branch, Updates)
        x = _input(args, kwargs)
        for ops, update in branch.each():
            assert isinstance(ops, BranchOps)
            terms = update.terms(ops, host)
            seed = self._seed() if _draws(terms, update) else None
            out = add_update(ops, host, x, base_out, out, terms, weight, update.training, seed)
        return out

    def _routed(
        self,
        routing: Routing,
        host: nn.Module,
        base_out: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Add each adapter's difference to its own rows or positions; all others keep the base's bits."""
        names = tuple(name for name in routing.names if name in self._modules)
        for name in names:
            if isinstance(self._modules[name], ModuleCopy) and not _is_one_to_one(args, kwargs, base_out):
                raise _only_alone(name, host, "it takes or returns other than one tensor")
        if not names:
            return base_out
        x = _input(args, kwargs)
        out, names = add_together(self, routing, host, x, base_out, names)
        if not names:
            return out
        leading = self.ops.positions(host, x) if self.ops is not None else tuple(x.shape[:1])
        order, counts, depth = routing.places(names, leading, x.device)
        x_rows, base_rows = (part.flatten(0, depth - 1).index_select(0, order) for part in (x, base_out))
        others = {key: value for key, value in kwargs.items() if value is not x}
        changed = []
        pieces = zip(names, x_rows.split_with_sizes(counts), base_rows.split_with_sizes(counts), strict=True)
        for name, own, base in pieces:
            weight = self.active.strengths.get(name, 1.0)
            changed.append(self._add(name, host, base, base, (own, *args[1:]), others, weight))
        return with_positions(out, depth, order, torch.cat(changed))

    def _routed_by_weight(
        self,
        ops: WeightOps,
        routing: Routing,
        host: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run each adapter's rows again with its weights; all others keep the base's bits."""
        plans = []  # all of them first: what cannot be routed is refused before anything runs
        for name in routing.names:
            if name not in self._modules:
                continue
            leading = ops.positions(host, _input(args, kwargs))
            device = next(host.parameters(recurse=False)).device
            places, _, depth = routing.places([name], leading, device)
            if len(places) > 0:
                plans.append((name, places, depth, *ops.select(host, args, kwargs, places, depth)))
        out = forward(*args, **kwargs)
        for name, places, depth, own_args, own_kwargs in plans:
            tensors = self._tensors(host, {name: self.active.strengths.get(name, 1.0)})
            rows = ops.run(host, forward, tensors, own_args, own_kwargs)
            out = ops.put(host, out, places, depth, rows)
        return out

    def _tensors(self, host: nn.Module, strengths: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the host's parameters as these adapters make them, differentiable in the adapters' tensors.

        In the parameter's own dtype, rounded once from fp32: what merging would write.
        """
        found = {}
        for key, change in total_difference(host, self.named(), strengths).items():
            base = host.get_parameter(key).detach()
            found[key] = (base.to(change.dtype) + change).to(base.dtype)
        return found


def _draws(terms: Terms, update: Update) -> bool:
    """Tell whether an update drops some of its input, by a seed; a graph of torch.compile draws for itself."""
    return terms.dropout > 0.0 and update.training and not torch.compiler.is_compiling()


# What the hosts call their input, where a call names it; several may be named, in any order.
_INPUTS = ("input", "query", "input1", "hidden_states", "x")


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the input of a call: the first argument, or the one that is called so."""
    if args:
        return args[0]
    return next((kwargs[name] for name in _INPUTS if name in kwargs), next(iter(kwargs.values()), None))


def _is_one_to_one(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> bool:
    """Tell whether a call takes one tensor, its input, and returns one."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return len(given) == 1 and given[0] is _input(args, kwargs) and isinstance(out, Tensor)


def _only_alone(name: str, host: nn.Module, why: str) -> RoutingError:
    return RoutingError(
        f"adapter '{name}' trains a {host_class(host).__name__} in full and {why}: "
        "it can act alone at strength 1, but not be mixed, weighted or routed."
    )


def total_difference(
    host: nn.Module, branches: Mapping[str, Branch], strengths: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the sum of several adapters' differences by parameter, each times its strength."""
    total: dict[str, Tensor] = {}
    for name, strength in strengths.items():
        for key, difference in differences(host, branches[name]).items():
            change = strength * difference
            total[key] = total[key] + change if key in total else change
    return total


def differences(host: nn.Module, branch: Branch) -> dict[str, Tensor]:
    """Return what one adapter's branch adds to the host's parameters at strength 1, by the parameter's name.

    In fp32 (fp64 of fp64) and native shape, differentiable in the adapter's tensors.
    """
    found: dict[str, Tensor] = {}
    if isinstance(branch, ModuleCopy):
        for key, parameter in branch.own_parameters().items():
            base = host.get_parameter(key).detach()
            wide = torch.promote_types(base.dtype, torch.float32)
            found[key] = parameter.to(wide) - base.to(wide)
        return found
    assert isinstance(branch, Updates)
    for ops, update in branch.each():
        W = ops.weight(host).detach()
        terms = update.terms(ops, host)
        if terms.A is not None or terms.dense is not None:
            change = ops.as_weight(host, terms.change(ops.as_matrix(host, W)))
            found[ops.parameter] = found[ops.parameter] + change if ops.parameter in found else change
        if terms.bias_shift is not None:
            wide = torch.promote_types(W.dtype, torch.float32)
            shift = ops.as_bias(host, terms.bias_shift.to(wide))
            key = ops.bias_parameter
            found[key] = found[key] + shift if key in found else shift
    return found
