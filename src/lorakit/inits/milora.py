"""MiLoRA: the minor singular components of the weight are what learns.

Wang, Li, Wang, Chen, Chen; 2024, arXiv 2406.09044.

    W0 = U S V^T,    A = sqrt(S_m / s) V_m^T,   B = U_m sqrt(S_m / s)          (s = alpha / rank)

with the ``rank`` smallest singular values ``S_m``: the update starts in directions that the weight uses least, and
what it knows in the others stays.

Differences from the paper: the base keeps its weight and the frozen start is taken off in the update, as in
``lorakit.inits.pissa``; a direction with a singular value of 0 is given the size of the smallest that is not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.inits.init import Init
from lorakit.inits.svd import Directions, all_directions, balanced, visible, weight_to_start_from
from lorakit.layers import Site


class MiLoRA(Init):
    """The pair starts as the minor part of the weight; the model's function is kept."""

    name: ClassVar[str] = "milora"
    shifts: ClassVar[bool] = True

    @torch.no_grad()
    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`; computed where the weight is."""
        found = all_directions(weight_to_start_from(site, self.name))
        values = visible(found.values, (site.d_out, site.d_in))
        return balanced(Directions(found.left, values, found.right).last(rank), scale)
