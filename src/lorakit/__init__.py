"""lorakit: LoRA from a folder of examples to a server.

    import lorakit as lk

    handle = lk.attach(model, lk.LoRA(rank=8), targets="all-linear")   # adapt any torch model in place
    run = lk.fit("a/model", rows)                                      # or do everything at once

Names are loaded when first used, so that ``import lorakit`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lorakit.version import __version__ as __version__

_PLACES = {
    "AdapterState": "lorakit.adapters",
    "Calibration": "lorakit.inits",
    "KeepEnergy": "lorakit.compose.selection",
    "KeepNumbers": "lorakit.compose.selection",
    "KeepRank": "lorakit.compose.selection",
    "PiSSA": "lorakit.inits.pissa",
    "compress": "lorakit.compose.compress",
    "Handle": "lorakit.adapters",
    "SiteState": "lorakit.adapters",
    "attach": "lorakit.adapters",
    "handle_of": "lorakit.adapters",
    "AdaLoRA": "lorakit.methods.adalora",
    "DoRA": "lorakit.methods.dora",
    "DyLoRA": "lorakit.methods.dylora",
    "IncreLoRA": "lorakit.methods.increlora",
    "LoRA": "lorakit.methods.lora",
    "LoRAFA": "lorakit.methods.lorafa",
    "LoRAPlus": "lorakit.methods.loraplus",
    "LoRAPro": "lorakit.methods.lorapro",
    "VeRA": "lorakit.methods.vera",
    "Method": "lorakit.methods",
    "Terms": "lorakit.layers",
    "LorakitError": "lorakit.errors",
    "InputError": "lorakit.errors",
    "load": "lorakit.formats.store:load_adapter",
    "save": "lorakit.formats.store:save_adapter",
    "fit": "lorakit.training.fit",
}

if TYPE_CHECKING:
    from lorakit.adapters import AdapterState, Handle, SiteState, attach, handle_of
    from lorakit.compose.compress import compress
    from lorakit.compose.selection import KeepEnergy, KeepNumbers, KeepRank
    from lorakit.errors import InputError, LorakitError
    from lorakit.formats.store import load_adapter as load
    from lorakit.formats.store import save_adapter as save
    from lorakit.inits import Calibration
    from lorakit.inits.pissa import PiSSA
    from lorakit.layers import Terms
    from lorakit.methods import Method
    from lorakit.methods.adalora import AdaLoRA
    from lorakit.methods.dora import DoRA
    from lorakit.methods.dylora import DyLoRA
    from lorakit.methods.increlora import IncreLoRA
    from lorakit.methods.lora import LoRA
    from lorakit.methods.lorafa import LoRAFA
    from lorakit.methods.loraplus import LoRAPlus
    from lorakit.methods.lorapro import LoRAPro
    from lorakit.methods.vera import VeRA
    from lorakit.training.fit import fit

__all__ = [
    "AdaLoRA",
    "AdapterState",
    "Calibration",
    "DoRA",
    "DyLoRA",
    "Handle",
    "IncreLoRA",
    "InputError",
    "KeepEnergy",
    "KeepNumbers",
    "KeepRank",
    "LoRA",
    "LoRAFA",
    "LoRAPlus",
    "LoRAPro",
    "LorakitError",
    "Method",
    "PiSSA",
    "SiteState",
    "Terms",
    "VeRA",
    "attach",
    "compress",
    "fit",
    "handle_of",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lorakit' has no attribute '{name}'")
    module, _, other = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(module), other or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
