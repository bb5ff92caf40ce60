"""``Init``: the contract of an initialisation, and how one is found by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError, did_you_mean
from lorakit.inits.calibration import Calibration
from lorakit.layers import Site
from lorakit.settings import Settings


class Init(Settings):
    """How ``A`` and ``B`` start, drawn in fp32 on the CPU so that every device gets the same numbers.

    Attributes:
        name: how configs and the command line call it.
        peft: PEFT's spelling in ``init_lora_weights``; None where PEFT has no name for it, or another meaning.
        shifts: whether the pair starts with ``B A != 0`` and the model's function is kept all the same: the update
            is ``scale (B A - B0 A0)`` with the frozen start ``A0``, ``B0``.
        changes_start: whether the pair starts with ``B A != 0`` and the model's function changes with it.
    """

    name: ClassVar[str]
    peft: ClassVar[bool | str | None] = None
    shifts: ClassVar[bool] = False
    changes_start: ClassVar[bool] = False

    def refusal(self, site: Site) -> str | None:
        """Return why a site cannot start so, or None where it can."""
        return None

    def looks(self) -> str | None:
        """Return what the init must see of the model on examples, as words; None where it needs none."""
        return None

    def look(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        calibration: Calibration,
        generator: torch.Generator,
    ) -> Mapping[str, Any]:
        """Run the model on examples and return what :meth:`draw` needs of each site, by path.

        The model's parameters, flags, mode and hooks are as before afterwards.

        Args:
            model: the bare base.
            sites: where pairs will act.
            ranks: their ranks by path.
            scales: the factors on ``B A`` by path.
            calibration: the examples.
            generator: a CPU generator; all randomness comes from it.

        Raises:
            DataError: the examples do not suffice.
        """
        return {}

    @abstractmethod
    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(A[rank, d_in], B[d_out, rank])`` in fp32, with ``site.stack`` in front.

        Args:
            site: where the pair acts.
            rank: its rank.
            scale: the factor on ``B A``.
            generator: a CPU generator; all randomness comes from it.
            seen: what :meth:`look` returned for this site.
        """


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


def init_types() -> tuple[type[Init], ...]:
    """Return all initialisations' types, sorted by name."""
    return tuple(_registry()[name] for name in init_names())


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
