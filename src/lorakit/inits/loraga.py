"""LoRA-GA: LoRA with gradient approximation.

Wang, Yu, Li; 2024, arXiv 2407.05000. With the base's gradient ``G = U diag(S) V^T`` at a layer and ``m = d_out``,

    A = c V[:, :r]^T,   B = c U[:, r:2r],   c = m^(1/4) / sqrt(gamma),   W = W0 + s (B A - B0 A0)

The first step changes the weight by ``-lr s^2 (B0 B0^T G + G A0^T A0)``: the index sets are disjoint, so that this is
the best approximation of the gradient that a rank of 2r allows. The function at the start is the base's.

Differences from the paper:
    The base stays as it is: the offset ``-s B0 A0`` is the adapter's own, see ``LowRankUpdate``.
    gamma is not 16. The offset's largest singular value is ``s c^2 = s sqrt(m) / gamma``. Where it is large against
    what training changes, the update is held to the 2r directions of the start: better than rank r where the
    examples' gradient is the whole of what there is to learn, far worse where it is only a sample's (both are in
    ``experiments/gates/loraga.py``). By default each layer's c makes it 3 % of the weight's own largest singular
    value, which leaves the pair free. Where a gamma that is given makes it more than a tenth, the log says so.
    A side below 2r has no 2r directions: B then takes the last r of those there are.
    A matrix of a stack (an expert) that no example has reached starts as in plain LoRA.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.inits.calibration import Calibration
from lorakit.inits.gradients import gradient_directions, refuse_zero
from lorakit.inits.init import Init
from lorakit.inits.kaiming import Kaiming
from lorakit.inits.svd import Directions
from lorakit.layers import Site

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]

USUAL_OFFSET, LARGEST_OFFSET = 0.03, 0.1
"""Of the base weight's largest singular value: one above the second holds the update to the directions of the start."""

GAMMA_OF_ZERO = 1024.0
"""For a weight that is zero, which says nothing of sizes."""

_log = logging.getLogger(__name__)


class LoRAGA(Init):
    """The pair starts along the loss's gradient, and the function stays.

    Attributes:
        gamma: the larger, the smaller the pair; None makes it fit the weight, see above.
        rows: examples that are looked at.
    """

    name: ClassVar[str] = "loraga"
    shifts: ClassVar[bool] = True

    gamma: Positive | None = None
    rows: Count = 32

    def looks(self) -> str | None:
        """Return what is looked at."""
        return "the gradient of the loss"

    def look(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        calibration: Calibration,
        generator: torch.Generator,
    ) -> Mapping[str, tuple[Directions, float]]:
        """Return the leading ``2 rank`` triples of each site's gradient, and the factor c."""
        counts = {site.path: min(2 * ranks[site.path], site.d_out, site.d_in) for site in sites}
        found = gradient_directions(model, sites, counts, calibration.first(self.rows), generator)
        refuse_zero(sites, found)
        own = {site.path: largest_singular_value(site.matrix(), generator) for site in sites}
        sizes = {site.path: self._size(site, scales[site.path], own[site.path]) for site in sites}
        above = {path: scales[path] * sizes[path] ** 2 / own[path] for path in sizes if own[path] > 0}
        worst = max(above, key=lambda path: above[path], default="")
        if above and above[worst] > LARGEST_OFFSET * 1.01:
            _log.warning(
                "init 'loraga' starts with an offset of up to %.2g times the weight's largest singular value (at "
                "'%s'): the update will hardly leave the directions that the examples' gradient has. Use "
                "gamma >= %.2g, or leave it out, unless that is wanted.",
                above[worst],
                worst,
                (self.gamma or 0.0) * above[worst] / LARGEST_OFFSET,
            )
        return {path: (directions, sizes[path]) for path, directions in found.items()}

    def _size(self, site: Site, scale: float, own: float) -> float:
        """Return c for a site whose weight's largest singular value is ``own``."""
        if self.gamma is None and own > 0:
            return float((USUAL_OFFSET * own / scale) ** 0.5)
        return float(site.d_out**0.25 / (self.gamma or GAMMA_OF_ZERO) ** 0.5)

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`."""
        directions, size = seen
        A = size * directions.right[..., :rank].mT.contiguous()
        B = size * directions.left[..., -rank:].contiguous()
        return where_reached(directions, (A, B), Kaiming().draw(site, rank, scale, generator))


def where_reached(seen: Directions, pair: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the pair, with the plain one's in the place of matrices of a stack whose gradient is zero."""
    reached = (seen.values[..., :1] > 0)[..., None]
    A, B = (torch.where(reached, own.float(), other) for own, other in zip(pair, plain, strict=True))
    return A, B


def largest_singular_value(matrix: Tensor, generator: torch.Generator, steps: int = 12) -> float:
    """Return a matrix's largest singular value (of a stack, the smallest of these) to some percent, by powers."""
    W = matrix.float()
    x = torch.randn(*W.shape[:-2], W.shape[-1], 1, generator=generator).to(W.device)
    for _ in range(steps):
        x = W.mT @ (W @ x)
        x = x / x.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return float((W @ x).norm(dim=-2).min())
