"""EVA: explained variance adaptation.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter; 2024, arXiv 2410.07170.

    A = the leading right singular vectors of the layer's centred inputs,    B = 0

The components come from a PCA that goes on batch by batch, on real tokens alone, until each component's cosine with
itself one batch before is at least ``tau``; layers that read one input are looked at once. Ranks by explained variance
are a method's own choice: ``rank='auto'`` with ``rank_by='inputs'``.

Differences from the paper: the components are those of the pooled tokens of up to ``rows`` examples, with more of
them kept on the way; a layer whose inputs are not rows (embeddings, convolutions, attention by weight) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.inits.calibration import Calibration
from lorakit.inits.init import Init
from lorakit.inits.inputs import Components, components_of_inputs, input_refusal
from lorakit.layers import Site


class EVA(Init):
    """``A`` starts along the inputs' principal components, ``B`` at zero.

    Attributes:
        tau: cosine from which on a component counts as found.
        rows: examples that are looked at, at most.
    """

    name: ClassVar[str] = "eva"

    tau: Annotated[float, Field(gt=0, le=1)] = 0.99
    rows: Annotated[int, Field(ge=1, strict=True)] = 512

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
    ) -> Mapping[str, Components]:
        """Return the components of each site's inputs."""
        return components_of_inputs(model, sites, ranks, calibration.first(self.rows), self.tau)

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`."""
        assert isinstance(seen, Components)
        return seen.directions()[:rank].cpu().clone(), torch.zeros(site.d_out, rank)
