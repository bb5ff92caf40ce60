"""OLoRA: Orthonormal Low-Rank Adaptation.

Büyükakyüz; 2024, arXiv 2406.01775.

    W0 = Q R,    A = R_r / sqrt(s),   B = Q_r / sqrt(s)          (s = alpha / rank)

with the first ``rank`` columns of Q and rows of R, so that ``s B A = Q_r R_r``. ``Q_r`` is the orthonormal basis of
the weight's first ``rank`` columns and ``R_r = Q_r^T W0``: no other column needs to be decomposed.

Differences from the paper: the base keeps its weight and the frozen start is taken off in the update, as in
``lorakit.inits.pissa``. The factor ``s`` stands in the pair in equal parts, so that what is taken off is ``Q_r R_r``
for any alpha; the paper's code takes off ``s Q_r R_r``, which for ``s != 1`` is no part of the weight.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.inits.init import Init
from lorakit.inits.svd import weight_to_start_from
from lorakit.layers import Site


class OLoRA(Init):
    """The pair starts as a part of the weight with an orthogonal ``B``; the model's function is kept."""

    name: ClassVar[str] = "olora"
    shifts: ClassVar[bool] = True

    @torch.no_grad()
    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`; computed where the weight is."""
        W = weight_to_start_from(site, self.name)
        Q = torch.linalg.qr(W[..., :, :rank]).Q
        return Q.mT @ W / math.sqrt(scale), Q / math.sqrt(scale)
