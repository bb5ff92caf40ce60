"""Gaussian start: ``A ~ N(0, 1/rank^2)``, ``B = 0`` (the paper's text, with PEFT's deviation ``1/rank``).

For an embedding the roles are exchanged as in the Kaiming start.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.inits.init import Init
from lorakit.inits.kaiming import reversed_start
from lorakit.layers import Site


class Gaussian(Init):
    """``A`` normal with deviation ``1 / rank``, ``B`` zero."""

    name: ClassVar[str] = "gaussian"
    peft: ClassVar[bool | str | None] = "gaussian"

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`."""
        if site.ops.input_is_index:
            return reversed_start(site, rank, generator)
        A = torch.randn(*site.stack, rank, site.d_in, generator=generator) / rank
        return A, torch.zeros(*site.stack, site.d_out, rank)
