"""Cutting a trained adapter to fewer numbers, with the error known before and measured after.

The singular components of every layer's ``scale B A`` come from its factors, in fp64 (``decompose`` of
``lorakit.adapters.spectrum``; no dense ``[d_out, d_in]`` matrix is made). A :class:`Selection` weighs those of all
layers against each other, and what is left out is the error:

    || dW - dW' ||_F^2 = sum of sigma^2 over the components left out, of all layers          (Eckart & Young 1936)

The pair of a layer that keeps k components is ``A = sqrt(S / s) V^T``, ``B = U sqrt(S / s)`` with the factor ``s`` that
the method's alpha means at rank k. Everything else (biases, modules trained in full, rows of tokens) stays as it is.

DoRA's magnitudes stay as they are, too. What is exact there is the pair: the rows' norms ``||W0 + s B A||`` are another
number with another pair, so that the change of the weight is not the predicted one to the last digit.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters.spectrum import Pair, decompose, low_rank_pair, num_directions
from lorakit.adapters.state import AdapterState, SiteState
from lorakit.compose.selection import Components, Selection
from lorakit.errors import InputError, UnsupportedLayerError, bullet_list, quoted
from lorakit.inits.kaiming import Kaiming
from lorakit.inits.svd import Directions, balanced
from lorakit.methods.lora import LoRA
from lorakit.methods.patterns import at_sites


@dataclass(frozen=True)
class CutLayer:
    """What became of one layer, or of one stack of matrices.

    Attributes:
        path: the layer.
        rank_before, rank_after: of its pair; 0 where nothing of it is left.
        numbers_before, numbers_after: of its pair.
        energy: ``sum sigma^2`` of its update, that is its squared Frobenius norm.
        predicted: the squared error that the components left out predict.
        measured: the squared error of the pair as it is stored.
    """

    path: str
    rank_before: int
    rank_after: int
    numbers_before: int
    numbers_after: int
    energy: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Compressed:
    """A smaller adapter, and what that cost.

    Attributes:
        state: the adapter.
        layers: what became of each layer.
        notes: what the figures do not say.
    """

    state: AdapterState
    layers: tuple[CutLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def energy_kept(self) -> float:
        """Share of the update's energy that is kept, predicted."""
        return 1.0 - self.predicted_error**2

    @property
    def predicted_error(self) -> float:
        """``||dW - dW'|| / ||dW||`` over all layers, from the components left out."""
        return math.sqrt(math.fsum(cut.predicted for cut in self.layers) / math.fsum(cut.energy for cut in self.layers))

    @property
    def measured_error(self) -> float:
        """The same of the pairs as they are stored."""
        return math.sqrt(math.fsum(cut.measured for cut in self.layers) / math.fsum(cut.energy for cut in self.layers))


@torch.no_grad()
def compress(state: AdapterState, selection: Selection) -> Compressed:
    """Return the adapter with the components that ``selection`` keeps.

    >>> from lorakit.adapters import AdapterState, SiteState
    >>> pair = {"A": torch.eye(3, 5), "B": torch.tensor([2.0, 1.0, 0.0]) * torch.eye(4, 3)}
    >>> state = AdapterState(LoRA(rank=3, alpha=3.0), {"layer": SiteState("linear", (4, 5), pair)})
    >>> from lorakit.compose.selection import KeepRank
    >>> round(compress(state, KeepRank(rank=1)).energy_kept, 6)
    0.8

    Raises:
        UnsupportedLayerError: the adapter, or one of its layers, is no pair of factors.
        InputError: its updates are all zero, or the selection leaves nothing out.
        ConfigError: a budget below one component.
    """
    pairs = _pairs(state)
    assert isinstance(state.method, LoRA)
    found = {path: decompose(*pair) for path, pair in pairs.items()}
    layers = [_components(state, path, found[path], pairs[path]) for path in pairs]
    if not any(layer.energies for layer in layers):
        raise InputError("every update of the adapter is zero: there is nothing to keep.")
    ranks = dict(zip(pairs, selection.ranks(layers), strict=True))
    if all(ranks[path] == pair[0].shape[-2] for path, pair in pairs.items()):
        raise InputError("nothing would be cut: every component of every layer is kept. Ask for less.")
    method = _method(state.method, {path: rank for path, rank in ranks.items() if rank})
    sites: dict[str, SiteState] = {}
    cuts = []
    for path, site in state.sites.items():
        if ranks[path]:
            sites[path] = _cut(site, found[path].first(ranks[path]), method.scale_at(path))
        after = low_rank_pair(method, path, sites[path], torch.float64) if ranks[path] else None
        cuts.append(_figures(path, pairs[path], after, found[path]))
    targets = _targets(state, sites)
    return Compressed(
        dataclasses.replace(state, method=method, sites=sites, targets=targets), tuple(cuts), tuple(_notes(state))
    )


def _pairs(state: AdapterState) -> dict[str, Pair]:
    if not state.sites:
        raise UnsupportedLayerError("the adapter has no low-rank update to cut: it trains modules in full alone.")
    if not isinstance(state.method, LoRA):
        raise UnsupportedLayerError(
            f"method '{state.method.name}' keeps no pair A, B of its own for each layer: there is nothing to cut."
        )
    found = {path: low_rank_pair(state.method, path, site, torch.float64) for path, site in state.sites.items()}
    known = {path: pair for path, pair in found.items() if pair is not None}
    problems = [
        f"'{path}' has {quoted(sorted(state.sites[path].tensors))}, which is no pair A, B"
        for path in found
        if path not in known
    ]
    problems += [
        f"'{path}' is not finite" for path, pair in known.items() if not all(bool(t.isfinite().all()) for t in pair)
    ]
    if problems:
        raise UnsupportedLayerError(f"the adapter cannot be cut: {bullet_list(problems)}.")
    return known


def _components(state: AdapterState, path: str, found: Directions, pair: Pair) -> Components:
    """Return a layer's components; of a stack their sums, as far as any matrix of it has them."""
    values = found.values.reshape(-1, found.values.shape[-1])
    count = max((num_directions(one) for one in values), default=0)
    energies = tuple(values.square().sum(dim=0)[:count].tolist())
    # A bias or a magnitude is stored beside a pair: without the pair its place would be lost.
    beside = path in state.biases or len(state.sites[path].tensors) > 2
    return Components(energies, _numbers(pair) // pair[0].shape[-2], least=1 if beside else 0)


def _numbers(pair: Pair) -> int:
    return sum(factor.numel() for factor in pair)


def _method(method: LoRA, ranks: Mapping[str, int]) -> LoRA:
    """Return the method with these ranks and the scale that its alpha means at each."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    plain: LoRA = method.replaced(rank=usual, budget=None, init=Kaiming(), rank_pattern={}, alpha_pattern={})
    return at_sites(plain, {path: (rank, plain.scale_at(path, rank)) for path, rank in ranks.items()})


def _cut(site: SiteState, kept: Directions, scale: float) -> SiteState:
    dtype = site.tensors["A"].dtype
    A, B = balanced(kept, scale)
    tensors = {**site.tensors, "A": A.to(dtype).contiguous(), "B": B.to(dtype).contiguous()}
    return dataclasses.replace(site, tensors=tensors)


def _figures(path: str, before: Pair, after: Pair | None, found: Directions) -> CutLayer:
    squares = found.values.square()
    rank = 0 if after is None else after[0].shape[-2]
    return CutLayer(
        path=path,
        rank_before=before[0].shape[-2],
        rank_after=rank,
        numbers_before=_numbers(before),
        numbers_after=0 if after is None else _numbers(after),
        energy=float(squares.sum()),
        predicted=float(squares[..., rank:].sum()),
        measured=float(squares.sum()) if after is None else squared_distance(before, after),
    )


def squared_distance(first: Pair, second: Pair) -> float:
    """Return ``||B A - B' A'||_F^2``, over a stack summed, from the factors."""
    A = torch.cat([first[0], second[0]], dim=-2)
    B = torch.cat([first[1], -second[1]], dim=-1)
    left: Tensor = torch.linalg.qr(B, mode="r").R
    right: Tensor = torch.linalg.qr(A.mT, mode="r").R
    return float((left @ right.mT).square().sum())


def _targets(state: AdapterState, kept: Mapping[str, SiteState]) -> tuple[str, ...]:
    """Return names that mean the layers that are left: the old ones that mean no other, and paths."""

    def means(name: str, path: str) -> bool:
        return path == name or path.endswith(f".{name}")

    gone = [path for path in state.sites if path not in kept]
    names = [name for name in state.targets if not any(means(name, path) for path in gone)]
    return (*names, *(path for path in kept if not any(means(name, path) for name in names)))


def _notes(state: AdapterState) -> list[str]:
    beside = sorted({name for site in state.sites.values() for name in site.tensors} - {"A", "B"})
    if not beside:
        return []
    return [
        f"The figures are of the pairs. {quoted(beside)} stays as it is and acts on rows whose norm the pair changes: "
        "the error of the weights themselves is near these figures, not equal to them."
    ]
