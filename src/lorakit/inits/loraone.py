"""LoRA-One: the pair starts as one step of gradient descent.

Zhang, Liu, Chen; 2025, arXiv 2502.01235. With the base's gradient ``G`` at a layer and ``-G = U diag(S) V^T``,

    A = sqrt(S[:r] / S_1 / gamma) V[:, :r]^T,    B = U[:, :r] sqrt(S[:r] / S_1 / gamma),    W = W0 + s B A

so that the model starts at ``W0 - (s / (gamma S_1)) G_r``, with the gradient's best approximation ``G_r`` of rank r.
The function at the start is not the base's, on purpose; the saved adapter is a plain pair.

The normalisation by ``S_1`` is that of the authors' code; their paper has ``U diag(S)`` and ``diag(S) V^T``, each by
``sqrt(gamma)``, whose size depends on the loss's. The preconditioner of their optimizer is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.inits.calibration import Calibration
from lorakit.inits.gradients import gradient_directions, refuse_zero
from lorakit.inits.init import Init
from lorakit.inits.kaiming import Kaiming
from lorakit.inits.loraga import Count, Positive, where_reached
from lorakit.inits.svd import Directions
from lorakit.layers import Site


class LoRAOne(Init):
    """The pair starts with a step down the loss's gradient.

    Attributes:
        gamma: the step's largest singular value is ``scale / gamma``.
        rows: examples that are looked at.
    """

    name: ClassVar[str] = "loraone"
    changes_start: ClassVar[bool] = True

    gamma: Positive = 128.0
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
    ) -> Mapping[str, Directions]:
        """Return the leading ``rank`` triples of each site's gradient."""
        found = gradient_directions(model, sites, ranks, calibration.first(self.rows), generator)
        refuse_zero(sites, found)
        return found

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`; the minus sign is in ``B``."""
        assert isinstance(seen, Directions)
        root = (seen.values / seen.values[..., :1].clamp_min(torch.finfo(seen.values.dtype).tiny) / self.gamma).sqrt()
        A, B = root[..., :, None] * seen.right.mT, -seen.left * root[..., None, :]
        return where_reached(seen, (A, B), Kaiming().draw(site, rank, scale, generator))
