"""Walking through the base alone: its modules and parameters, past what attaching put into the model.

Adapters live in children called ``lorakit``. These walks never enter one, so that what they cost depends on the base
and not on how many adapters it has.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

ADAPTER_SEGMENT = "lorakit"
"""Attribute under which a host layer keeps its adapters; no base tensor has it in its name."""


def walk(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module as ``named_modules()`` does, the root with the path '', without children ``lorakit``.

    Args:
        model: the base, adapted or not.
        remove_duplicate: yield a module that occurs under several names once, under the first.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if remove_duplicate:
            if id(module) in seen:
                continue
            seen.add(id(module))
        yield path, module
        inner = f"{path}." if path else ""
        children = [
            (f"{inner}{name}", child)
            for name, child in module._modules.items()
            if child is not None and name != ADAPTER_SEGMENT
        ]
        waiting += reversed(children)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path that is known to be there, as ``get_submodule`` does in three times the time."""
    module = model
    for name in path.split(".") if path else ():
        child = module._modules[name]
        assert child is not None
        module = child
    return module


def walk_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the base's parameters by name as ``named_parameters()`` does, without those of adapters."""
    seen: set[int] = set()
    for path, module in walk(model, remove_duplicate):
        inner = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            if remove_duplicate:
                seen.add(id(parameter))
            yield f"{inner}{name}", parameter
