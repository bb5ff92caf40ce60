"""Modules trained in full: the adapter's own copy of a head, an embedding or a norm.

The base module is never trained in place. While the adapter acts, its copy stands in for the base's
module; several adapters add their differences from the base's output, so that copies switch, route,
weigh and merge like any update.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from lorakit.adapters.checkpointing import InputGradients


class ModuleCopy(nn.Module):
    """An adapter's own trained copy of one module.

    Attributes:
        module: the copy, in the adapter's dtype.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, only: frozenset[str] | None = None) -> None:
        """Keep ``module`` (already a copy) and make its parameters, or those named in ``only``, trainable."""
        super().__init__()
        self.module = module
        self.only = only
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(only is None or name in only)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy; its parameters are rounded to the input's dtype where that differs."""
        given = next(_float_inputs(args, kwargs), None)
        parameters = dict(self.module.named_parameters())
        dtype = next(iter(parameters.values())).dtype
        if given is None or given.dtype == dtype or torch.is_autocast_enabled(given.device.type):
            return self.module(*args, **kwargs)
        rounded = {name: parameter.to(given.dtype) for name, parameter in parameters.items()}
        return torch.func.functional_call(self.module, rounded, args, kwargs)

    def in_place_of(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the copy where ``host`` would run: an output that follows from no float input has the host's dtype."""
        out = self(*args, **kwargs)
        if any(True for _ in _float_inputs(args, kwargs)) or not isinstance(out, Tensor):
            return out
        return out.to(next(host.parameters()).dtype)

    def train(self, mode: bool = True) -> Self:
        """Follow the model's mode; a copy of which only the bias is trained keeps the base's statistics."""
        return super().train(mode and self.only is None)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the adapter trains."""
        return {n: p for n, p in self.module.named_parameters() if self.only is None or n in self.only}

    def tensors(self) -> dict[str, Tensor]:
        """Return what a saved adapter keeps of this module: its parameters and persistent buffers."""
        state = self.module.state_dict(keep_vars=True)
        return state if self.only is None else {name: state[name] for name in sorted(self.only)}


def _float_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the floating-point tensors among a call's arguments, also that of a packed sequence."""
    for value in (*args, *kwargs.values()):
        tensor = value.data if isinstance(value, PackedSequence) else value
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            yield tensor


def leaf_modules(root: nn.Module, path: str) -> dict[str, nn.Module]:
    """Return the modules at or below ``path`` that hold parameters of their own, by path.

    A module with parameters of its own is taken whole, with whatever lies below it.
    """
    module = root.get_submodule(path)
    if any(True for _ in module.parameters(recurse=False)):
        return {path: module}
    found: dict[str, nn.Module] = {}
    for name, _ in module.named_children():
        found.update(leaf_modules(root, f"{path}.{name}"))
    return found


def pristine_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module without anything that attaching added to it."""
    from lorakit.adapters.host import restore

    gone = object()  # stands for the hooks' owner, which holds the whole model: a copy is not to copy that
    owners = [owner for inner in module.modules() for owner in _hook_owners(inner).values()]
    clone = copy.deepcopy(module, {id(owner): gone for owner in owners if isinstance(owner, InputGradients)})
    for inner in list(clone.modules()):
        restore(inner)
        for key in [key for key, owner in _hook_owners(inner).items() if owner is gone]:
            del inner._forward_hooks[key]
    return clone


def _hook_owners(module: nn.Module) -> dict[int, object]:
    """Return whose methods look at a module's output."""
    return {key: hook.__self__ for key, hook in module._forward_hooks.items() if hasattr(hook, "__self__")}
