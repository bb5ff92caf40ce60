"""Blank starts: stand-ins of the same size for starts that are drawn, or looked for, at some cost."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.inits import Init
from lorakit.layers import Site


class Blank(Init):
    """``A = B = 0``: for tensors that are loaded over it, and for simulating a run."""

    name: ClassVar[str] = "blank"

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return zeros, on the site's device at once."""
        device = site.ops.weight(site.layer).device
        A = torch.zeros(*site.stack, rank, site.d_in, device=device)
        return A, torch.zeros(*site.stack, site.d_out, rank, device=device)


class BlankShifted(Blank):
    """The same with a frozen start beside the pair."""

    name: ClassVar[str] = "blank-shifted"
    shifts: ClassVar[bool] = True
