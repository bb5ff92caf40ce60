"""Kaiming start, as in the paper's code (Hu et al. 2021, arXiv 2106.09685).

    A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)),  B = 0          (Kaiming uniform with a = sqrt(5))

For an embedding the roles are exchanged, ``A = 0`` and ``B ~ N(0, 1)``, as its authors do: a
look-up reads one column of A, so its size must not shrink with the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.inits.init import Init
from lorakit.layers import Site


def reversed_start(site: Site, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the start of an embedding's update: ``A = 0``, ``B ~ N(0, 1)``."""
    return torch.zeros(rank, site.d_in), torch.randn(site.d_out, rank, generator=generator)


class Kaiming(Init):
    """``A`` uniform with variance ``1 / (3 d_in)``, ``B`` zero."""

    name: ClassVar[str] = "kaiming"
    peft: ClassVar[bool | str | None] = True

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`."""
        if site.ops.input_is_index:
            return reversed_start(site, rank, generator)
        bound = 1.0 / math.sqrt(site.d_in)
        A = torch.empty(*site.stack, rank, site.d_in).uniform_(-bound, bound, generator=generator)
        return A, torch.zeros(*site.stack, site.d_out, rank)
