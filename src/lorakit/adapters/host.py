"""How a layer becomes a host: it keeps its identity and gets a class of its own on top.

Attaching changes the module's class to ``AdaptedX(Adapted, X)``. The object stays where it is in the
tree, it is still an ``X``, and every key of its state stays what it was; the adapters' parameters
live in one child called ``lorakit``. The class survives ``deepcopy``, ``pickle`` and ``torch.save``.

One forward, no modes: ``out = base(x)``, then each active adapter adds its difference from that same
output to its positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from lorakit.adapters.copies import ModuleCopy
from lorakit.adapters.routing import Routing
from lorakit.errors import RoutingError, UnsupportedLayerError
from lorakit.layers import LayerOps, add_update
from lorakit.layers.ops import host_class
from lorakit.methods import Selection, Update


@dataclass
class Active(Selection):
    """What acts in a model now; one object is shared by all hosts.

    Attributes:
        strengths: a lasting factor per adapter, 1.0 where none is set.
        routing: who acts on which row or position; None where ``weights`` acts on all.
        merged: the weights hold the updates already, so that hosts add nothing.
    """

    strengths: dict[str, float] = field(default_factory=dict)
    routing: Routing | None = None
    merged: bool = False

    def strength(self, name: str) -> float:
        """Return the adapter's strength on every row, 0.0 where it does not act."""
        if self.merged or self.routing is not None:
            return 0.0
        return self.weights.get(name, 0.0) * self.strengths.get(name, 1.0)


class Branches(nn.Module):
    """The adapters' parts at one host, by adapter name."""

    def __init__(self, ops: LayerOps | None, active: Active) -> None:
        super().__init__()
        self.ops = ops
        self.active = active

    def put(self, name: str, branch: Update | ModuleCopy) -> None:
        """Add a part; any name will do, also one that ``nn.Module`` uses itself ('train')."""
        self._modules[name] = branch

    def drop(self, name: str) -> None:
        """Remove a part."""
        del self._modules[name]

    def named(self) -> Mapping[str, Update | ModuleCopy]:
        """Return the parts by adapter name."""
        return cast("Mapping[str, Update | ModuleCopy]", self._modules)

    def replacement(self) -> ModuleCopy | None:
        """Return the one module copy that stands in for the host on all rows, or None."""
        if self.active.merged or self.active.routing is not None:
            return None
        acting = [name for name in self._modules if self.active.strength(name) != 0.0]
        if len(acting) != 1 or self.active.strength(acting[0]) != 1.0:
            return None
        branch = self._modules[acting[0]]
        return branch if isinstance(branch, ModuleCopy) else None

    def add_to(self, host: nn.Module, base_out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the base's output with every active adapter's difference added."""
        if self.active.merged:
            return base_out
        if self.active.routing is not None:
            return self._routed(self.active.routing, host, base_out, args, kwargs)
        out = base_out
        for name in self._modules:
            weight = self.active.strength(name)
            if weight != 0.0:
                out = self._add(name, host, base_out, out, args, kwargs, weight)
        return out

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
                raise RoutingError(
                    f"adapter '{name}' replaces a {host_class(host).__name__} by one of another output; "
                    "it can act alone at strength 1, but not be mixed, weighted or routed."
                )
            return out + weight * (own - base_out)
        assert self.ops is not None
        assert isinstance(branch, Update)
        x = args[0] if args else next(iter(kwargs.values()))
        terms = branch.terms(self.ops, host)
        return add_update(self.ops, host, x, base_out, out, terms, weight, branch.training)

    def _routed(
        self,
        routing: Routing,
        host: nn.Module,
        base_out: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Add each adapter's difference to its own rows or positions; all others keep the base's bits."""
        x = args[0] if args else next(iter(kwargs.values()))
        leading = self.ops.positions(host, x) if self.ops is not None else tuple(x.shape[:1])
        out = base_out
        for name in routing.names:
            if name not in self._modules:
                continue
            places, depth = routing.places(name, leading, x.device)
            if len(places) == 0:
                continue
            x_rows = x.flatten(0, depth - 1).index_select(0, places)
            base_rows = base_out.flatten(0, depth - 1).index_select(0, places)
            weight = self.active.strengths.get(name, 1.0)
            changed = self._add(name, host, base_rows, base_rows, (x_rows,), {}, weight)
            flat = out.flatten(0, depth - 1).index_copy(0, places, changed.to(out.dtype))
            out = flat.view(out.shape)
        return out


class Adapted:
    """The class put on top of a host's own."""

    lorakit: Branches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host, then add what the active adapters say."""
        stand_in = self.lorakit.replacement()
        if stand_in is not None:
            return stand_in.in_place_of(cast(nn.Module, self), args, kwargs)
        base_out = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.lorakit.add_to(cast(nn.Module, self), base_out, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (adapted_class, host_class(cast(nn.Module, self))), _state_of(cast(nn.Module, self))


class KeepsStatistics:
    """Put on top of a base module with running statistics: training never updates them.

    ``_lorakit_mode`` is the mode that the model wants; it is the module's again once it is restored.
    """

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode, whatever the model does; adapters' own copies below follow it."""
        module = cast(nn.Module, self)
        module.__dict__["_lorakit_mode"] = mode
        module.training = False
        for child in module.children():
            child.train(mode)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (keeping_class, host_class(cast(nn.Module, self))), _state_of(cast(nn.Module, self))


_CLASSES: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}


def adapted_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``Adapted<Host>(Adapted, Host)``; the same one for every layer of a kind."""
    keeps = issubclass(host, nn.modules.batchnorm._NormBase)
    return _class_on_top("Adapted", (Adapted, KeepsStatistics) if keeps else (Adapted,), host)


def keeping_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``Keeping<Host>(KeepsStatistics, Host)``."""
    return _class_on_top("Keeping", (KeepsStatistics,), host)


def _class_on_top(word: str, top: tuple[type, ...], host: type[nn.Module]) -> type[nn.Module]:
    if (word, host) not in _CLASSES:
        names = {"_lorakit_adapted": True, "__module__": __name__}
        _CLASSES[word, host] = type(f"{word}{host.__name__}", (*top, host), names)
    return _CLASSES[word, host]


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _rebind(module: nn.Module) -> None:
    """Let accelerate's hook, which calls what it once replaced, call the module's class's forward."""
    module.__dict__["_old_forward"] = functools.partial(type(module).forward, module)


def _state_of(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
    return state


def _rebuild(make: Callable[[type[nn.Module]], type[nn.Module]], host: type[nn.Module]) -> nn.Module:
    kind = make(host)
    return kind.__new__(kind)


def adapt(path: str, module: nn.Module, ops: LayerOps | None, active: Active) -> Branches:
    """Make a module a host (once) and return its branches. Changes the module's class.

    Raises:
        UnsupportedLayerError: the module's forward was replaced on the instance by something unknown.
    """
    if isinstance(module, Adapted):
        branches = module.lorakit
        if branches.ops is None:
            branches.ops = ops
        return branches
    hooked = _instance_forward(path, module)
    if "lorakit" in dict(module.named_children()):
        raise UnsupportedLayerError(f"layer '{path}' has a child of its own called 'lorakit'; it cannot be adapted.")
    branches = Branches(ops, active)
    branches.train(wanted_mode(module))
    module.add_module("lorakit", branches)
    _become(module, adapted_class(host_class(module)))
    if hooked:
        _rebind(module)
    return branches


def unadapt(module: nn.Module) -> None:
    """Undo :func:`adapt`; a base module whose statistics are kept goes on keeping them."""
    if not isinstance(module, Adapted):
        return
    del module._modules["lorakit"]
    if _calls(module.__dict__.get("forward"), type(module).forward):
        del module.__dict__["forward"]  # left by a hook of accelerate's that came and went meanwhile
    host = host_class(module)
    _become(module, keeping_class(host) if "_lorakit_mode" in module.__dict__ else host)
    if "_old_forward" in module.__dict__:
        _rebind(module)


def restore(module: nn.Module) -> None:
    """Undo :func:`adapt` and :func:`keep_statistics`: the module is what it was."""
    unadapt(module)
    if isinstance(module, KeepsStatistics):
        _become(module, host_class(module))
        module.training = module.__dict__.pop("_lorakit_mode")


def wanted_mode(module: nn.Module) -> bool:
    """Return whether the model wants this module to train, also where its base part stays in evaluation mode."""
    return bool(module.__dict__.get("_lorakit_mode", module.training))


def keep_statistics(model: nn.Module) -> None:
    """Stop every batch norm of the base from updating its running statistics. Changes their class."""
    for path, module in model.named_modules():
        if "lorakit" in path.split(".") or isinstance(module, (Adapted, KeepsStatistics)):
            continue
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            _become(module, keeping_class(type(module)))
            module.train(module.training)


def _calls(forward: Any, function: Any) -> bool:
    """Tell whether a forward set on an instance is ``function`` bound to it, as a method or as a partial."""
    own = forward.func if isinstance(forward, functools.partial) else getattr(forward, "__func__", None)
    return own is function


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Branches]]:
    """Yield path, host and branches of every adapted module."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield path, cast(nn.Module, module), module.lorakit


def _instance_forward(path: str, module: nn.Module) -> bool:
    """Tell whether accelerate's hook stands before this module's forward; refuse other replacements."""
    if "forward" not in module.__dict__:
        return False
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        return True
    raise UnsupportedLayerError(
        f"layer '{path}' has a forward set on the instance, which an update would not pass through. "
        "Attach before whatever replaces it."
    )


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the base's parameters: all but those below a child called ``lorakit``."""
    for name, parameter in model.named_parameters():
        if "lorakit" not in name.split("."):
            yield name, parameter
