"""How a layer becomes a host: it keeps its identity and gets a class of its own on top.

Attaching changes the module's class to ``AdaptedX(Adapted, X)``. The object stays where it is in the
tree, it is still an ``X``, and every key of its state stays what it was; the adapters' parameters
live in one child called ``lorakit``. The class survives ``deepcopy``, ``pickle`` and ``torch.save``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn

from lorakit.adapters.branches import Active, Branches
from lorakit.errors import UnsupportedLayerError
from lorakit.layers import LayerOps
from lorakit.layers.ops import host_class


class Adapted:
    """The class put on top of a host's own."""

    lorakit: Branches

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host with what the active adapters say."""
        stand_in = self.lorakit.replacement()
        if stand_in is not None:
            return stand_in.in_place_of(cast(nn.Module, self), args, kwargs)
        return self.lorakit.run(cast(nn.Module, self), super().forward, args, kwargs)  # type: ignore[misc]

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


# What a module of torch asks before it computes with its children's weights itself, past their forward.
_FAST_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


class WithoutFastPath:
    """Put on top of torch's encoder and its layers: while an adapter acts, every child runs its own forward.

    The base's rows in a mixed batch then come from that path too: the fast one's numbers but for their rounding,
    and at padded positions numbers where the fast one has zeros.
    """

    _lorakit_active: Active

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, on its fast path only where no adapter acts."""
        run = super().forward  # type: ignore[misc]
        if not self._lorakit_active.acts():
            return run(*args, **kwargs)
        switch = next(name for kind, name in _FAST_PATHS.items() if isinstance(self, kind))
        kept = getattr(self, switch)
        setattr(self, switch, False)
        try:
            return run(*args, **kwargs)
        finally:
            setattr(self, switch, kept)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (slow_class, host_class(cast(nn.Module, self))), _state_of(cast(nn.Module, self))


_CLASSES: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}


def adapted_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``Adapted<Host>(Adapted, Host)``; the same one for every layer of a kind."""
    keeps = issubclass(host, nn.modules.batchnorm._NormBase)
    return _class_on_top("Adapted", (Adapted, KeepsStatistics) if keeps else (Adapted,), host)


def keeping_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``Keeping<Host>(KeepsStatistics, Host)``."""
    return _class_on_top("Keeping", (KeepsStatistics,), host)


def slow_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the class ``Slow<Host>(WithoutFastPath, Host)``."""
    return _class_on_top("Slow", (WithoutFastPath,), host)


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


def _become_again(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module the class from before, with accelerate's hook as it is now: there, or gone meanwhile."""
    if _calls(module.__dict__.get("forward"), type(module).forward):
        del module.__dict__["forward"]  # left by a hook that came and went while the class was on top
    _become(module, kind)
    if "_old_forward" in module.__dict__:
        _rebind(module)


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
    host = host_class(module)
    _become_again(module, keeping_class(host) if "_lorakit_mode" in module.__dict__ else host)


def restore(module: nn.Module) -> None:
    """Undo :func:`adapt`, :func:`keep_statistics` and :func:`leave_fast_paths`: the module is what it was."""
    unadapt(module)
    if isinstance(module, WithoutFastPath):
        _become_again(module, host_class(module))
        del module.__dict__["_lorakit_active"]
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


def leave_fast_paths(model: nn.Module, active: Active) -> None:
    """Keep torch's encoder and its layers from reading their children's weights while an adapter acts.

    Changes their class; also of subclasses, whose own forward may call torch's. One whose switch is missing
    is left as it is.
    """
    for module in model.modules():
        for kind, switch in _FAST_PATHS.items():
            if isinstance(module, kind) and switch in module.__dict__ and not isinstance(module, WithoutFastPath):
                module.__dict__["_lorakit_active"] = active
                _become(module, slow_class(type(module)))
                if "_old_forward" in module.__dict__:
                    _rebind(module)


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
