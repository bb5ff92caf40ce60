"""Head only: the model's output head is trained in full, everything below it stays frozen.

The other end of the comparison: what the base's features are worth without adapting any of them.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lorakit.methods.modules import ModulesMethod


class Head(ModulesMethod):
    """Train the output head in the adapter's own copy; it has no fields."""

    name: ClassVar[str] = "head"

    def modules_in_full(self, model: nn.Module) -> list[str]:
        """Return the word for the model's output head."""
        return ["head"]
