"""Head only: the model's output head is trained in full, everything below it stays frozen.

The other end of the comparison: what the base's features are worth without adapting any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from lorakit.layers import Site
from lorakit.methods.method import AdapterParts, Method


class Head(Method):
    """Train the output head in the adapter's own copy; it has no fields."""

    name: ClassVar[str] = "head"

    def needs_sites(self) -> bool:
        """Return False: no low-rank update is made."""
        return False

    def modules_in_full(self, model: nn.Module) -> list[str]:
        """Return the word for the model's output head."""
        return ["head"]

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
