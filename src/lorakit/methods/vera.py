"""VeRA: Vector-based Random Matrix Adaptation.

Kopiczko, Blankevoort, Asano; 2023, arXiv 2310.11454.

    W' = W0 + diag(b) B diag(d) A     A[rank, d_in], B[d_out, rank] drawn once and frozen, d[rank], b[d_out] trained

All layers share one pair: ``A[rank, n_max]`` and ``B[m_max, rank]`` for the widest of them, of which a layer takes the
first ``d_in`` columns and ``d_out`` rows. A layer has ``d_out + rank`` numbers. A and B are Kaiming uniform,
``U(-c, c)`` with ``c = sqrt(6 / fan_in)``, fan_in ``n_max`` and ``rank``; ``d`` starts at 0.1 and ``b`` at 0, so that
the function is kept. There is no alpha.

Differences from the paper: the shared pair fits every kind of layer as a matrix, convolutions flattened; of a stack of
expert weights each expert has a ``d`` and a ``b`` of its own. The pair is saved with the adapter, since what a seed
draws is not promised from one version of torch to the next; ``save_projection=False`` saves the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.method import AdapterParts, Method, Update
from lorakit.methods.shared import Shared, SharingUpdate

Pair = tuple[Tensor, Tensor]


class VeRAUpdate(SharingUpdate):
    """The two trained vectors of one layer: ``d[rank]``, ``b[d_out]``; of a stack ``[E, rank]``, ``[E, d_out]``."""

    def __init__(self, shared: Shared, holds: bool, d: Tensor, b: Tensor, d_in: int, dropout: float) -> None:
        super().__init__(shared, holds)
        self.d, self.b = nn.Parameter(d), nn.Parameter(b)
        self.d_in, self.dropout = d_in, dropout

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the layer's slices of the shared pair with both gains."""
        A, B = slices(self.shared.tensors(), self.b, self.d_in)
        device = self.d.device  # the same, unless the model was spread over devices after attaching
        return Terms(A.to(device), B.to(device), rank_gain=self.d, out_gain=self.b, dropout=self.dropout)

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.d.shape[-1]}, dropout={self.dropout:g}"


def slices(shared: Mapping[str, Tensor], b: Tensor, d_in: int) -> Pair:
    """Return a layer's ``A[rank, d_in]`` and ``B[d_out, rank]`` of the shared pair, once for each matrix of a stack."""
    A, B = shared["A"][:, :d_in], shared["B"][: b.shape[-1]]
    stack = b.shape[:-1]
    return A.expand(*stack, *A.shape), B.expand(*stack, *B.shape)


def draw(rank: int, d_in: int, d_out: int, seed: int) -> dict[str, Tensor]:
    """Draw the shared pair ``A[rank, d_in]`` and ``B[d_out, rank]``, fp32 on the CPU; as PEFT does of the same seed."""
    generator = torch.Generator().manual_seed(seed)
    bounds = {"A": ((rank, d_in), math.sqrt(6.0 / d_in)), "B": ((d_out, rank), math.sqrt(6.0 / rank))}
    return {name: torch.empty(shape).uniform_(-c, c, generator=generator) for name, (shape, c) in bounds.items()}


class VeRA(Method):
    """One frozen random pair for all layers, and two trained vectors for each.

    Its numbers are few and want a learning rate some ten times LoRA's.

    >>> VeRA(rank=64).summary()["d_init"]
    0.1

    Attributes:
        rank: rows of A and columns of B; may be above a layer's smaller side.
        d_init: where the vector between A and B starts; ``b`` starts at 0.
        dropout: probability with which A's input is dropped while training.
        projection_seed: what A and B are drawn from, PEFT's ``projection_prng_key``; None draws a seed.
        save_projection: save A and B with the adapter, not the seed alone.
    """

    name: ClassVar[str] = "vera"
    peft_tensors: ClassVar[Mapping[str, str]] = {"d": "vera_lambda_d", "b": "vera_lambda_b"}

    rank: Annotated[int, Field(ge=1, strict=True)] = 256
    d_init: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    projection_seed: Annotated[int, Field(ge=0, strict=True)] | None = None
    save_projection: bool = True

    def refusal(self, site: Site) -> str | None:
        """Refuse tables of tokens, for which A would have a column per token, and dropout where it cannot act."""
        if site.ops.input_is_index:
            return "an embedding would need a column of the shared A for every token"
        if self.dropout > 0 and not site.ops.takes_dropout:
            return f"dropout={self.dropout:g} has no input of its own to act on here; use dropout=0"
        return None

    def build(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        dtype: torch.dtype,
        seen: Mapping[str, Any] = MappingProxyType({}),
    ) -> AdapterParts:
        """Make two vectors per site, and one shared pair per device, see :class:`Method`."""
        drawn = int(torch.randint(2**31, (1,), generator=generator))
        seed = drawn if self.projection_seed is None else self.projection_seed
        if not sites:
            return AdapterParts({})
        pair = draw(self.rank, max(site.d_in for site in sites), max(site.d_out for site in sites), seed)
        shared: dict[torch.device, Shared] = {}
        updates: dict[str, Update] = {}
        for site in sites:
            device = site.ops.weight(site.layer).device
            holds = device not in shared
            if holds:
                shared[device] = Shared({name: tensor.to(device, dtype) for name, tensor in pair.items()}, seed)
            d = torch.full((*site.stack, self.rank), self.d_init, device=device, dtype=dtype)
            b = torch.zeros(*site.stack, site.d_out, device=device, dtype=dtype)
            updates[site.path] = VeRAUpdate(shared[device], holds, d, b, site.d_in, self.dropout)
        return AdapterParts(updates)

    def finished(self, updates: Mapping[str, Update]) -> Method:
        """Return the method with the seed; where the pair is not what that seed gives, it is always saved."""
        seeds = {update.shared.seed for update in updates.values() if isinstance(update, SharingUpdate)}
        known = seeds - {None}
        if None in seeds:
            return self if self.save_projection else self.replaced(save_projection=True)
        return self.replaced(projection_seed=known.pop()) if known else self

    def pair(
        self,
        tensors: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        d_in: int,
        dtype: torch.dtype = torch.float32,
    ) -> Pair:
        """Return a saved layer's factors with both gains in them: its update is ``B A``."""
        d, b = tensors["d"].to(dtype), tensors["b"].to(dtype)
        A, B = slices(shared, b, d_in)
        return A.to(dtype) * d[..., :, None], B.to(dtype) * b[..., :, None]

    def to_peft(self) -> dict[str, Any]:
        """Return the fields of PEFT's ``VeraConfig``."""
        return {
            "peft_type": "VERA",
            "r": self.rank,
            "d_initial": self.d_init,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.projection_seed or 0,
            "save_projection": self.save_projection,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method | None:
        """Read a ``VeraConfig``."""
        if str(config.get("peft_type", "")).upper() != "VERA":
            return None
        return cls(
            rank=config.get("r", 256),
            d_init=config.get("d_initial", 0.1),
            dropout=config.get("vera_dropout") or 0.0,
            projection_seed=config.get("projection_prng_key") or 0,
            save_projection=bool(config.get("save_projection", True)),
        )
