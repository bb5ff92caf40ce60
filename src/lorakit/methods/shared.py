"""``Shared``: frozen tensors that several updates of one adapter read; there is one copy on each device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorakit.methods.method import Update


class Shared(nn.Module):
    """Tensors that no update trains.

    The first update on a device holds this as its child: so it moves, is copied and is pickled with the model, once.
    The others only point at it.

    Attributes:
        seed: what the tensors were drawn from; None where they were given, and are not those that the seed gives.
    """

    def __init__(self, tensors: Mapping[str, Tensor], seed: int | None) -> None:
        super().__init__()
        self.seed = seed
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return dict(self.named_buffers(recurse=False))

    @torch.no_grad()
    def load(self, given: Mapping[str, Tensor]) -> list[str]:
        """Take a saved adapter's tensors, bit for bit, also larger ones; return what is wrong with them."""
        own = self.tensors()
        problems = [f"the adapter has no shared tensor '{name}'" for name in own if name not in given]
        problems += [f"shared tensor '{name}' has no place here" for name in given if name not in own]
        for name, tensor in own.items():
            if name in given and (smaller := _smaller(given[name], tensor)) is not None:
                problems.append(f"shared tensor '{name}' {smaller}")
        if problems:
            return problems
        for name, tensor in own.items():
            if given[name].shape != tensor.shape or not torch.equal(given[name].to(tensor), tensor):
                self.seed = None
            self.register_buffer(name, given[name].detach().to(tensor.device, tensor.dtype, copy=True))
        return []


def _smaller(given: Tensor, own: Tensor) -> str | None:
    """Say that a given tensor is too small, or None where every slice of the own can be taken from it."""
    if given.dim() == own.dim() and all(there >= here for there, here in zip(given.shape, own.shape, strict=True)):
        return None
    return f"is {tuple(given.shape)} in the adapter, at least {tuple(own.shape)} is needed here"


class SharingUpdate(Update):
    """An update that reads shared tensors.

    Attributes:
        holds: it has them as its child.
    """

    def __init__(self, shared: Shared, holds: bool) -> None:
        super().__init__()
        self._pointer = (shared,)  # in a tuple, which nn.Module takes no notice of
        if holds:
            self.add_module("shared_tensors", shared)

    @property
    def shared(self) -> Shared:
        """What it reads."""
        return self._pointer[0]
