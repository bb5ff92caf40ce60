"""PiSSA: Principal Singular values and Singular vectors Adaptation.

Meng, Wang, Zhang; 2024, arXiv 2404.02948.

    W0 = U S V^T,    A = sqrt(S_r / s) V_r^T,   B = U_r sqrt(S_r / s)          (eqs. 2 and 3, s = alpha / rank)

so that the pair starts as the principal part of the weight, ``s B A = U_r S_r V_r^T``. With ``steps`` the first
directions come from a block Krylov iteration, which a large weight has in a small part of the time.

Differences from the paper: the base keeps its weight, where the paper puts ``W0 - s B A`` in its place; the frozen
start is taken off in the update instead, so that nothing is lost to the base's dtype, adapters can share a base, and
weight decay draws to the base and not away from it. The paper's fast decomposition is a subspace iteration; the
Krylov space has the same products in it and is more accurate. A direction that the weight does not have (a singular
value of 0) is given the size of the smallest that it has, since ``A = B = 0`` would never learn.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lorakit.inits.init import Init
from lorakit.inits.svd import Directions, all_directions, balanced, top_directions, visible, weight_to_start_from
from lorakit.layers import Site


class PiSSA(Init):
    """The pair starts as the principal part of the weight; the model's function is kept.

    Attributes:
        steps: how often the Krylov iteration applies ``W W^T``; None takes the exact decomposition.
    """

    name: ClassVar[str] = "pissa"
    shifts: ClassVar[bool] = True

    steps: Annotated[int, Field(ge=0, strict=True)] | None = None

    @torch.no_grad()
    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`; computed where the weight is."""
        W = weight_to_start_from(site, self.name)
        found = all_directions(W).first(rank) if self.steps is None else top_directions(W, rank, self.steps, generator)
        values = visible(found.values, (site.d_out, site.d_in))
        return balanced(Directions(found.left, values, found.right), scale)
