"""``Weight``: the update of one whole weight as PEFT has it; parts of a fused projection joined into one, and back.

PEFT knows one pair for a layer. Pairs of parts with one scale are exactly such a pair:

    A = [A_q; A_v]     B = [B_q  0 ]  rows of q       rank = rank_q + rank_v
                           [ 0   0 ]
                           [ 0  B_v]  rows of v

Vectors by rows (magnitude, bias) are whole only where the parts are all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import SiteState
from lorakit.formats.peft_notes import Note
from lorakit.layers.ops import Runs, num_rows
from lorakit.methods.lora import LoRA
from lorakit.methods.patterns import SCALE_TOLERANCE


@dataclass(frozen=True)
class Key:
    """What PEFT's patterns have to say of a path: the rank, and the scale of ``site`` at that site's own rank."""

    rank: int
    site: str
    site_rank: int

    def scale(self, method: LoRA) -> float:
        """Return the factor on ``B A``."""
        return method.scale_at(self.site, self.site_rank)


@dataclass(frozen=True)
class Share:
    """One site's share of a weight's update: ``rank`` of the ranks, in the order of the shares."""

    site: str
    rank: int
    runs: Runs | None = None


@dataclass(frozen=True)
class Weight:
    """The update of one whole weight.

    Attributes:
        path: the weight's path, without a part's name.
        kind: the layer's kind.
        shape: the base weight's native shape where it is known, else ``(d_out, d_in)``.
        tensors: ``A``, ``B`` and the method's others as in ``SiteState``, and ``bias`` where it is trained.
        shares: the sites whose update it is.
        options: see ``SiteState``.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    shares: tuple[Share, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """All ranks together."""
        return int(self.tensors["A"].shape[-2])

    def key(self) -> Key:
        """Return what PEFT's patterns have to say of it."""
        return Key(self.rank, self.shares[0].site, self.shares[0].rank)

    def notes(self) -> dict[str, Note]:
        """Return what the file says of each share."""
        return {s.site: Note(self.kind, self.shape, s.rank, s.runs, self.options) for s in self.shares}


def join(path: str, sites: Mapping[str, SiteState], biases: Mapping[str, Tensor], method: LoRA) -> Weight | None:
    """Return the sites of one weight as one update, or None where they are none: scales or vectors do not allow it."""
    first = next(iter(sites.values()))
    tensors = [{**s.tensors, **({"bias": biases[p]} if p in biases else {})} for p, s in sites.items()]
    shares = tuple(Share(p, int(s.tensors["A"].shape[-2]), s.runs) for p, s in sites.items())
    weight = Weight(path, first.kind, first.weight_shape, tensors[0], shares, first.options)
    if len(shares) == 1 and first.runs is None:
        return weight
    scales = [method.scale_at(share.site, share.rank) for share in shares]
    alike = all(own.keys() == tensors[0].keys() and _dtypes(own) == _dtypes(tensors[0]) for own in tensors)
    if not alike or not all(math.isclose(scale, scales[0], rel_tol=SCALE_TOLERANCE) for scale in scales):
        return None
    runs = [share.runs for share in shares if share.runs is not None]
    size = _num_outputs(weight)
    if set(tensors[0]) - {"A", "B"} and sum(num_rows(own) for own in runs) != size:
        return None
    joined = {"A": torch.cat([own["A"] for own in tensors], dim=-2), "B": _spread(tensors, runs, size)}
    for name in tensors[0].keys() - {"A", "B"}:
        joined[name] = torch.zeros(*tensors[0][name].shape[:-1], size, dtype=tensors[0][name].dtype)
        for own, rows in zip(tensors, runs, strict=True):
            joined[name].index_copy_(-1, _index(rows, own[name].device), own[name])
    return Weight(path, first.kind, first.weight_shape, joined, shares, first.options)


def split(weight: Weight) -> tuple[dict[str, SiteState], dict[str, Tensor], list[str]]:
    """Return the sites and biases of a weight's shares, and what speaks against the file."""
    A, B = weight.tensors["A"], weight.tensors["B"]
    if len(weight.shares) == 1 and weight.shares[0].runs is None and weight.shares[0].rank == weight.rank:
        tensors = dict(weight.tensors)
        site = weight.shares[0].site
        biases = {site: tensors.pop("bias")} if "bias" in tensors else {}
        return {site: SiteState(weight.kind, weight.shape, tensors, None, weight.options)}, biases, []
    return _split(weight, A, B)


def _split(weight: Weight, A: Tensor, B: Tensor) -> tuple[dict[str, SiteState], dict[str, Tensor], list[str]]:
    size = B.shape[-2]
    runs = [share.runs or ((0, size),) for share in weight.shares]
    ranks = [share.rank for share in weight.shares]
    if sum(ranks) != weight.rank or any(start < 0 or stop > size for own in runs for start, stop in own):
        return {}, {}, [f"'{weight.path}': the file's own notes name ranks or rows that its tensors do not have"]
    sites: dict[str, SiteState] = {}
    biases: dict[str, Tensor] = {}
    pieces: list[dict[str, Tensor]] = []
    start = 0
    for share, rows in zip(weight.shares, runs, strict=True):
        stop, index = start + share.rank, _index(rows, B.device)
        piece = {name: t.index_select(-1, index) for name, t in weight.tensors.items() if name not in ("A", "B")}
        piece |= {"A": A[..., start:stop, :], "B": B[..., start:stop].index_select(-2, index)}
        if "bias" in piece:
            biases[share.site] = piece.pop("bias")
        tensors = {name: piece[name].contiguous() for name in weight.tensors if name in piece}
        sites[share.site] = SiteState(weight.kind, weight.shape, tensors, share.runs, weight.options)
        pieces.append(tensors)
        start = stop
    if not torch.equal(_spread(pieces, runs, size), B):
        return {}, {}, [f"'{weight.path}' has numbers outside the parts that the file says it has"]
    return sites, biases, []


def _spread(tensors: Sequence[Mapping[str, Tensor]], runs: Sequence[Runs], size: int) -> Tensor:
    """Return B of all parts: each in its own rows and its own columns, zeros elsewhere."""
    columns = []
    for own, rows in zip(tensors, runs, strict=True):
        B = own["B"]
        columns.append(B.new_zeros(*B.shape[:-2], size, B.shape[-1]).index_copy_(-2, _index(rows, B.device), B))
    return torch.cat(columns, dim=-1)


def _index(runs: Runs, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])


def _num_outputs(weight: Weight) -> int:
    """Return the rows of the whole matrix: its numbers (of one of a stack) by its columns."""
    A = weight.tensors["A"]
    return math.prod(weight.shape) // (math.prod(A.shape[:-2]) * A.shape[-1])


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}
