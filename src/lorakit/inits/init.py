"""``Init``: the contract of an initialisation, and how one is found by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.errors import ConfigError, did_you_mean
from lorakit.layers import Site
from lorakit.settings import Settings


class Init(Settings):
    """How ``A`` and ``B`` start, drawn in fp32 on the CPU so that every device gets the same numbers.

    Attributes:
        name: how configs and the command line call it.
        peft: PEFT's spelling in ``init_lora_weights``; None where PEFT has no name for it.
    """

    name: ClassVar[str]
    peft: ClassVar[bool | str | None] = None

    @abstractmethod
    def draw(self, site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return ``(A[rank, d_in], B[d_out, rank])`` in fp32, with ``site.stack`` in front."""


@functools.cache
def _registry() -> dict[str, type[Init]]:
    import lorakit.inits as package

    found: dict[str, type[Init]] = {}
    for module in pkgutil.iter_modules(package.__path__, "lorakit.inits."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, Init) and not inspect.isabstract(kind):
                found[kind.name] = kind
    return found


def init_names() -> list[str]:
    """Return the names of all initialisations."""
    return sorted(_registry())


def find_init(value: Any) -> Init:
    """Return an :class:`Init` from one, from its name, or from ``{"name": ..., field: value}``.

    Raises:
        ConfigError: no initialisation has this name.
    """
    if isinstance(value, Init):
        return value
    fields = dict(value) if isinstance(value, dict) else {"name": value}
    name = fields.pop("name", None)
    if name not in _registry():
        raise ConfigError(f"no init '{name}'. Known: {', '.join(init_names())}.{did_you_mean(str(name), init_names())}")
    return _registry()[name](**fields)
