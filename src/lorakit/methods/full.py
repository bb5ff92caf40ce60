"""Full fine-tuning: every parameter is trained, in the adapter's own copies of all modules.

What LoRA is compared with. The base stays as it is, so that full fine-tuning can be switched off, routed and
merged as any adapter; the copies take as much memory as the base does again.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lorakit.errors import UnsupportedLayerError, quoted
from lorakit.methods.modules import ModulesMethod


class Full(ModulesMethod):
    """Train all modules in full; it has no fields."""

    name: ClassVar[str] = "full"

    def modules_in_full(self, model: nn.Module) -> list[str]:
        """Return the model's top modules.

        Raises:
            UnsupportedLayerError: the model has parameters of its own, beside its modules.
        """
        own = [name for name, _ in model.named_parameters(recurse=False)]
        if own:
            raise UnsupportedLayerError(
                f"method 'full' trains modules, and {quoted(own)} belong to the {type(model).__name__} itself. "
                "Put it inside a module."
            )
        return [name for name, child in model.named_children() if any(True for _ in child.parameters())]
