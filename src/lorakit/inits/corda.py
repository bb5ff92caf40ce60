"""CorDA: context-oriented decomposition adaptation.

Yang, Li, Zhou, Song, Wu, Nie, Ghanem; 2024, arXiv 2406.05223. With the second moments ``C = X^T X / tokens`` of a
layer's inputs on examples,

    W0 C = U diag(S) V^T,    s B A = U_k diag(S_k) V_k^T C^-1

where the k are the r largest triples (``keep='task'``: what the examples use is adapted) or the r smallest
(``keep='knowledge'``: what they use stays frozen). ``C`` gets one percent of its mean diagonal added to its own until
``C C^-1`` is the unit matrix to .05, twice as much each time, as in the authors' code.

Differences from the paper: the base stays as it is, the offset ``-s B0 A0`` is the adapter's own (see
``LowRankUpdate``); the moments are of real tokens alone and are not divided by the largest entry of each batch. They
take ``d_in^2`` numbers for each input while the examples are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.errors import DataError
from lorakit.inits.calibration import Calibration
from lorakit.inits.init import Init
from lorakit.inits.inputs import input_refusal, look_at_inputs, shared_inputs
from lorakit.inits.svd import Directions, all_directions, balanced, visible, weight_to_start_from
from lorakit.layers import Site

DAMPING, LARGEST_ERROR, MOST_DOUBLINGS = 0.01, 0.05, 16

Pair = tuple[Tensor, Tensor]


class CorDA(Init):
    """The pair takes the part of the weight that the examples use most, or least; the function stays.

    Attributes:
        keep: 'task' adapts what the examples use most; 'knowledge' protects it and adapts what they use least.
        rows: examples that are looked at.
    """

    name: ClassVar[str] = "corda"
    shifts: ClassVar[bool] = True

    keep: Literal["task", "knowledge"] = "task"
    rows: Annotated[int, Field(ge=1, strict=True)] = 256

    def refusal(self, site: Site) -> str | None:
        """Refuse sites whose inputs are not rows."""
        return input_refusal(site)

    def looks(self) -> str | None:
        """Return what is looked at."""
        return "the layers' inputs"

    def look(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        ranks: Mapping[str, int],
        scales: Mapping[str, float],
        calibration: Calibration,
        generator: torch.Generator,
    ) -> Mapping[str, Pair]:
        """Return ``sqrt(s) A`` and ``sqrt(s) B`` of each site."""
        calibration = calibration.first(self.rows)
        leaders = shared_inputs(model, sites, calibration)
        moments: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}

        def take(host: str, rows: Tensor) -> None:
            product = rows.T @ rows
            moments[host] = moments[host].add_(product) if host in moments else product
            tokens[host] = tokens.get(host, 0) + len(rows)

        look_at_inputs(model, dict.fromkeys(leaders.values()), calibration, take)
        unseen = [path for path, host in leaders.items() if host not in moments]
        if unseen:
            raise DataError(f"no token of the examples comes to {unseen}. Give more examples, or exclude them.")
        found: dict[str, Pair] = {}
        for host in list(moments):
            C, inverse = damped(host, moments.pop(host) / tokens[host])
            for site in (site for site in sites if leaders[site.path] == host):
                found[site.path] = self._pair(site, ranks[site.path], C, inverse)
        return found

    def _pair(self, site: Site, rank: int, C: Tensor, inverse: Tensor) -> Pair:
        found = all_directions(weight_to_start_from(site, self.name) @ C)
        values = visible(found.values, (site.d_out, site.d_in))
        every = Directions(found.left, values, found.right)
        A, B = balanced(every.first(rank) if self.keep == "task" else every.last(rank), 1.0)
        return (A @ inverse).cpu(), B.cpu()

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`."""
        A, B = seen
        return A / scale**0.5, B / scale**0.5


def damped(host: str, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second moments with enough added to their diagonal, and their inverse.

    Raises:
        DataError: they are zero, so that nothing helps.
    """
    unit = torch.eye(len(C), device=C.device)
    damping = DAMPING
    for _ in range(MOST_DOUBLINGS):
        D = C + damping * C.diagonal().mean() * unit
        inverse, failed = torch.linalg.inv_ex(D)
        if not failed and float(torch.dist(D @ inverse, unit)) < LARGEST_ERROR:
            return D, inverse
        damping *= 2
    raise DataError(f"the inputs of '{host}' are all zero on the examples: exclude it, or give others.")
