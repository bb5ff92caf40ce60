"""Numbers that describe the singular values of an update, and how layers are named, grouped and ordered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ShapeError
from lorakit.records import AdapterSpectrum, BaseOverlap, LayerSpectrum, to_json


def effective_rank(singular_values: Sequence[float]) -> float:
    """Return ``exp(H(p))`` with ``p_i = s_i / sum(s)`` (Roy & Vetterli 2007, "The effective rank").

    It is the number of equal singular values that would spread the update as evenly: between 1 and the
    number of nonzero values; 0 for an update that is zero.

    >>> round(effective_rank([2.0, 2.0, 2.0, 0.0]), 6)
    3.0
    """
    total = math.fsum(singular_values)
    if total <= 0.0:
        return 0.0
    shares = [value / total for value in singular_values if value > 0.0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def energy_kept(singular_values: Sequence[float], rank: int) -> float:
    """Return the share of ``sum(s^2)`` in the ``rank`` largest values (Eckart & Young 1936).

    It is 1 minus the relative squared Frobenius error of the best approximation of that rank; 1 for an
    update that is zero, of which nothing can be lost.

    >>> energy_kept([4.0, 3.0], 1)
    0.64

    Raises:
        ShapeError: ``rank`` is negative.
    """
    if rank < 0:
        raise ShapeError(f"the energy kept at rank {rank} was asked for; a rank is 0 or more.")
    energies = sorted((value * value for value in singular_values), reverse=True)
    total = math.fsum(energies)
    return math.fsum(energies[:rank]) / total if total > 0.0 else 1.0


def rank_for_energy(singular_values: Sequence[float], share: float) -> int:
    """Return the smallest rank whose best approximation keeps at least ``share`` of the energy.

    >>> rank_for_energy([4.0, 3.0, 0.1], 0.9)
    2
    """
    ranks = range(len(singular_values) + 1)
    return next((rank for rank in ranks if energy_kept(singular_values, rank) >= share), len(singular_values))


def update_norm(singular_values: Sequence[float]) -> float:
    """Return the Frobenius norm of the update, ``sqrt(sum(s^2))``."""
    return math.sqrt(math.fsum(value * value for value in singular_values))


def lower_ranks(rank: int) -> list[int]:
    """Return the powers of two below ``rank``: the ranks that an update might be cut to."""
    return [2**n for n in range(max(rank, 1).bit_length()) if 2**n < rank]


@dataclass(frozen=True)
class LearnedLayer:
    """What one matrix learned, ready to be shown.

    Attributes:
        path: the layer's full path in the model; ``expert`` which matrix of a stack, None where it is the only one.
        kind: the path without the block's number, shared by the layers of equal place in every block; numbers
            further down (``experts.3``) are written ``*``.
        block: the first number in the path; None where there is none.
        singular_values: of the update, largest first.
        effective_rank: see ``effective_rank``.
        relative_norm: norm of the update over norm of the base weight; None if the latter is unknown or 0.
        base_norm: Frobenius norm of the base weight, if it is known.
        overlap: how the update lies to its base weight, if it is known.
    """

    path: str
    kind: str
    block: int | None
    singular_values: tuple[float, ...]
    effective_rank: float
    relative_norm: float | None
    expert: int | None = None
    base_norm: float | None = None
    overlap: BaseOverlap | None = None

    @property
    def largest(self) -> float:
        """The update's largest singular value (its spectral norm)."""
        return max(self.singular_values, default=0.0)

    @property
    def norm(self) -> float:
        """The update's Frobenius norm."""
        return update_norm(self.singular_values)

    @property
    def rank(self) -> int:
        """How many singular values there are."""
        return len(self.singular_values)

    @property
    def rank_share(self) -> float:
        """Effective rank over rank."""
        return self.effective_rank / max(1, self.rank)

    @property
    def half_energy(self) -> float:
        """Energy kept at half the rank."""
        return energy_kept(self.singular_values, (self.rank + 1) // 2)

    @property
    def name(self) -> str:
        """The path, with the number of the expert of a stack."""
        return self.path if self.expert is None else f"{self.path}[{self.expert}]"


def learned_layers(spectra: Sequence[LayerSpectrum]) -> list[LearnedLayer]:
    """Describe every layer, layers of one kind together, kinds and blocks in the model's order."""
    kinds = kinds_of([spectrum.path for spectrum in spectra])
    layers = []
    for spectrum in spectra:
        kind, block = kinds[spectrum.path]
        norm = spectrum.base_norm
        layers.append(
            LearnedLayer(
                path=spectrum.path,
                kind=kind,
                block=block,
                singular_values=tuple(sorted(spectrum.singular_values, reverse=True)),
                effective_rank=effective_rank(spectrum.singular_values),
                relative_norm=update_norm(spectrum.singular_values) / norm if norm else None,
                expert=spectrum.expert,
                base_norm=norm,
                overlap=spectrum.overlap,
            )
        )
    place = {kind: index for index, kind in enumerate(dict.fromkeys(layer.kind for layer in layers))}
    return sorted(layers, key=lambda layer: place[layer.kind])


def kinds_of(paths: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """Return every layer's kind and the number of its block, see :class:`LearnedLayer`."""
    split = {path: _split(path) for path in paths}
    one_stem = len({stem for stem, block, _ in split.values() if block is not None}) <= 1
    kinds = {}
    for path, (stem, block, rest) in split.items():
        shown_stem = "" if one_stem and rest else stem
        kind = ".".join(part for part in (shown_stem, rest) if part) if block is not None else stem
        kinds[path] = (kind, block)
    return kinds


Read = Callable[[LearnedLayer], "float | None"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are shown as one: those of a kind, or the matrices of a stack."""

    name: str
    layers: tuple[LearnedLayer, ...]

    def values(self, read: Read) -> list[float]:
        """Return a figure of every layer that has it."""
        return [value for layer in self.layers if (value := read(layer)) is not None]

    def median(self, read: Read) -> float | None:
        """Return the median of a figure over the layers that have it; None where none has."""
        values = self.values(read)
        return statistics.median(values) if values else None


def by_kind(layers: Iterable[LearnedLayer]) -> list[LayerGroup]:
    """Group layers by kind, in their order."""
    return _grouped(layers, lambda layer: layer.kind)


def by_path(layers: Iterable[LearnedLayer]) -> list[LayerGroup]:
    """Group the matrices of a stack; every other layer is alone."""
    return _grouped(layers, lambda layer: layer.path)


def _grouped(layers: Iterable[LearnedLayer], name: Callable[[LearnedLayer], str]) -> list[LayerGroup]:
    groups: dict[str, list[LearnedLayer]] = {}
    for layer in layers:
        groups.setdefault(name(layer), []).append(layer)
    return [LayerGroup(name, tuple(inside)) for name, inside in groups.items()]


def largest_first(groups: Iterable[LayerGroup]) -> list[LayerGroup]:
    """Sort by the size of the update relative to its base weight, or by its own where that is not known."""
    known = list(groups)
    relative = all(group.median(lambda layer: layer.relative_norm) is not None for group in known)
    return sorted(known, key=lambda group: -(group.median(update_size(relative)) or 0.0))


def update_size(relative: bool) -> Read:
    """Return how to read an update's size: relative to its base weight, or its own norm."""
    return (lambda layer: layer.relative_norm) if relative else (lambda layer: layer.norm)


def energy_at(rank: int) -> Read:
    """Return how to read the energy kept at a rank."""
    return lambda layer: energy_kept(layer.singular_values, rank)


def overlap_figure(name: str) -> Read:
    """Return how to read a field of :class:`BaseOverlap`."""
    return lambda layer: None if layer.overlap is None else getattr(layer.overlap, name)


def common_prefix(paths: Sequence[str]) -> str:
    """Return the modules that all paths lie below, ``model.layers``; '' where there are none."""
    split = [path.split(".")[:-1] for path in paths]
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def short_names(names: Sequence[str], width: int) -> dict[str, str]:
    """Shorten dotted names to ``width`` characters: first part, ellipsis, last parts; where they stay apart.

    >>> short_names(["encoder.block.layer.SelfAttention.q"], 24)
    {'encoder.block.layer.SelfAttention.q': 'encoder….SelfAttention.q'}
    """
    shortened = {name: _shortened(name, width) for name in names}
    return shortened if len(set(shortened.values())) == len(shortened) else {name: name for name in names}


def _shortened(name: str, width: int) -> str:
    first, *rest = name.split(".")
    while len(rest) > 1 and len(name) > width:
        rest = rest[1:]
        name = ".".join([f"{first}…", *rest])
    return name


def _split(path: str) -> tuple[str, int | None, str]:
    """Split ``model.layers.3.mlp.experts.7.up`` into ``("model.layers", 3, "mlp.experts.*.up")``."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            rest = ("*" if inner.isdecimal() else inner for inner in parts[index + 1 :])
            return ".".join(parts[:index]), int(part), ".".join(rest)
    return path, None, ""


def as_json(found: AdapterSpectrum) -> dict[str, Any]:
    """Return all figures as plain JSON values; docs/spectrum.md says what they mean."""
    layers = learned_layers(found.layers)
    sizes = {(spectrum.path, spectrum.expert): spectrum for spectrum in found.layers}
    plain = {key: value for key, value in to_json(found).items() if key != "layers"}
    return {
        **plain,
        "kinds": [_kind_as_json(group) for group in by_kind(layers)],
        "layers": [_layer_as_json(layer, sizes[layer.path, layer.expert]) for layer in layers],
    }


def _layer_as_json(layer: LearnedLayer, spectrum: LayerSpectrum) -> dict[str, Any]:
    values = layer.singular_values
    return {
        "path": layer.path,
        "expert": layer.expert,
        "kind": layer.kind,
        "block": layer.block,
        "d_out": spectrum.d_out,
        "d_in": spectrum.d_in,
        "rank": layer.rank,
        "singular_values": list(values),
        "effective_rank": layer.effective_rank,
        "energy_kept": {str(rank): energy_kept(values, rank) for rank in [*lower_ranks(layer.rank), layer.rank]},
        "rank_for_90_percent": rank_for_energy(values, 0.9),
        "norm": layer.norm,
        "spectral_norm": layer.largest,
        "base_norm": layer.base_norm,
        "relative_norm": layer.relative_norm,
        "overlap": to_json(layer.overlap),
    }


def _kind_as_json(group: LayerGroup) -> dict[str, Any]:
    def spread(read: Read) -> dict[str, float] | None:
        values = group.values(read)
        return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None

    return {
        "kind": group.name,
        "num_layers": len({layer.path for layer in group.layers}),
        "num_matrices": len(group.layers),
        "effective_rank": spread(lambda layer: layer.effective_rank),
        "energy_at_half_rank": spread(lambda layer: layer.half_energy),
        "norm": spread(lambda layer: layer.norm),
        "relative_norm": spread(lambda layer: layer.relative_norm),
    }
