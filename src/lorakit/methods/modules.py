"""``ModulesMethod``: methods that train modules in full and make no update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lorakit.layers import Site
from lorakit.methods.method import AdapterParts, Method


class ModulesMethod(Method):
    """A method that has no sites: what it trains are the adapter's own copies of modules."""

    def needs_sites(self) -> bool:
        """Return False: no low-rank update is made."""
        return False

    @abstractmethod
    def modules_in_full(self, model: nn.Module) -> list[str]:
        """Return the modules to train, as ``train_modules`` names them."""

    def build(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        dtype: torch.dtype,
        seen: Mapping[str, Any] = MappingProxyType({}),
    ) -> AdapterParts:
        """Make no updates."""
        return AdapterParts({})
