"""DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation.

Valipour, Rezagholizadeh, Kobyzev, Ghodsi; 2023 (EACL), arXiv 2210.07558.

    h = W0 x + scale * B[:, :b] A[:b] x      b drawn anew in every step from 1 ... rank while training, b = rank in use

The first components so learn to do without the later ones: one training gives an adapter of every lower rank, by
cutting off rows of A and columns of B, see :func:`truncated`.

Differences from the paper:

- The factor is that of the full rank, ``alpha / rank``, at every ``b``. The best updates of rank 1, 2, ... are nested,
  each the one before plus one component (Eckart and Young 1936), only if the factor does not change with ``b``; with
  ``alpha / b`` the first component would have to be of another size for every ``b``.
- All components that act in a step learn, as in the paper's first form; none is frozen in its second one's way.
- ``b`` is drawn for a step and not for a micro-batch, from the adapter's seed and the step alone: accumulated gradients
  are of one function, all processes agree, and a resumed run draws what it would have drawn.
- In use all components act: what is attached, saved and merged is a plain LoRA.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from lorakit.errors import ShapeError, UnsupportedLayerError, quoted
from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.lora import LoRA, LowRankUpdate
from lorakit.methods.method import Method, Update
from lorakit.methods.patterns import at_sites
from lorakit.methods.rule import Rule

State = TypeVar("State")


class DyLoRAUpdate(LowRankUpdate):
    """A pair of which only the first components act while it trains.

    Attributes:
        acting: ``[rank]``, one for those that act and zero for the others; it counts in training alone.
        seed: of the draws.
    """

    acting: Tensor

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, bias: Tensor | None, seed: int = 0) -> None:
        super().__init__(A, B, scale, dropout, bias)
        self.register_buffer("acting", torch.ones(A.shape[-2], device=A.device, dtype=A.dtype), persistent=False)
        self.seed = seed

    def act(self, count: int) -> None:
        """Let the first ``count`` components act while training."""
        self.acting.copy_(torch.arange(len(self.acting)) < count)

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the pair; while training, without the components that do not act."""
        # A product and no cut: shapes that change would have torch.compile begin again.
        A = self.A * self.acting[:, None] if self.training else self.A
        return Terms(A, self.B, self.scale, dropout=self.dropout, bias_shift=self.bias_shift(ops, layer))


class DyLoRARule(Rule):
    """Draws for each step how many components act.

    Attributes:
        lowest, highest: the least and the most.
        seed: of the draws.
    """

    def __init__(self, updates: Mapping[str, Update], num_steps: int, lowest: int) -> None:
        super().__init__(updates, num_steps)
        self.nested = [update for update in updates.values() if isinstance(update, DyLoRAUpdate)]
        self.lowest, self.highest = lowest, max((len(update.acting) for update in self.nested), default=lowest)
        self.seed = self.nested[0].seed if self.nested else 0
        self._act(1)

    def drawn(self, step: int) -> int:
        """Return how many components act in the ``step``-th step."""
        return random.Random(f"{self.seed}/{step}").randint(min(self.lowest, self.highest), self.highest)

    def after_step(self, step: int) -> None:
        """Draw for the next step."""
        self._act(step + 1)

    def state(self) -> dict[str, Tensor]:
        """Return the seed and the step that is next."""
        return {"seed": torch.tensor(self.seed), "next": torch.tensor(self._next)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Draw again for the step that is next."""
        self.seed = int(tensors["seed"])
        self._act(int(tensors["next"]))

    def _act(self, step: int) -> None:
        self._next = step
        for update in self.nested:
            update.act(self.drawn(step))


class DyLoRA(LoRA):
    """LoRA whose every lower rank is trained too, so that it can be cut down later. Fields as in LoRA, and one more.

    Attributes:
        rank_min: the lowest rank that is trained.
    """

    name: ClassVar[str] = "dylora"

    rank_min: Annotated[int, Field(ge=1, strict=True)] = 1

    @model_validator(mode="after")
    def _startable(self) -> Self:
        if self.init.shifts or self.init.changes_start:
            raise ValueError(
                f"init '{self.init.name}' starts with a pair that cannot be cut: take one that starts with B A = 0"
            )
        if isinstance(self.rank, int) and self.rank_min > self.rank:
            raise ValueError(f"rank_min {self.rank_min} is above rank {self.rank}")
        return self

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None) -> DyLoRAUpdate:
        """Make the update of one site."""
        seed = int(torch.randint(2**62, (1,), generator=generator))
        A, B, bias = self.start(site, generator, dtype, seen)
        return DyLoRAUpdate(A, B, self.scale_at(site.path), self.dropout, bias, seed)

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        """Return the rule that draws."""
        return DyLoRARule(updates, num_steps, self.rank_min)

    def finished(self, updates: Mapping[str, Update]) -> Method:
        """Return plain LoRA."""
        return LoRA(**{name: getattr(self, name) for name in LoRA.model_fields})


def truncated(state: State, rank: int) -> State:
    """Return a saved adapter (an ``AdapterState``) with each layer's first ``rank`` components, and the same factor.

    For an adapter that DyLoRA has trained, or another whose components stand in their order of importance.

    Raises:
        UnsupportedLayerError: it is not made of plain pairs.
        ShapeError: it has fewer components than asked for.
    """
    given: Any = state
    others = sorted(path for path, site in given.sites.items() if set(site.tensors) != {"A", "B"})
    if not isinstance(given.method, LoRA) or others or not given.sites:
        found = f"of method '{given.method.name}'" + (f", with other tensors at {quoted(others)}" if others else "")
        raise UnsupportedLayerError(f"only plain pairs A, B can be cut to a lower rank; this adapter is {found}.")
    ranks = {path: int(site.tensors["A"].shape[-2]) for path, site in given.sites.items()}
    if not 1 <= rank <= max(ranks.values()):
        raise ShapeError(f"cannot cut to rank {rank}: the adapter's ranks go from 1 to {max(ranks.values())}.")
    wanted = {path: (min(rank, own), given.method.scale_at(path, own)) for path, own in ranks.items()}
    sites = {}
    for path, site in given.sites.items():
        A, B = site.tensors["A"][..., :rank, :], site.tensors["B"][..., :rank]
        sites[path] = replace(site, tensors={"A": A.contiguous(), "B": B.contiguous()})
    cut: State = replace(given, method=at_sites(given.method, wanted), sites=sites)
    return cut
