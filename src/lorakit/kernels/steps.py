"""How many steps the optimizers of this process have taken.

Tensors count writes to them, but not those of a fused optimizer (``torch.optim.AdamW(fused=True)``, torch 2.13): what
follows from trained tensors and is kept must ask here as well.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_taken = 0


def optimizer_steps() -> int:
    """Return the number of steps that all optimizers have taken since this module was loaded."""
    return _taken


def _count(*_: Any) -> None:
    global _taken
    _taken += 1


register_optimizer_step_post_hook(_count)
