"""Numbers that describe the singular values of an update, and the order in which layers are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.errors import ShapeError
from lorakit.records import LayerSpectrum


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


@dataclass(frozen=True)
class LearnedLayer:
    """What one layer learned, ready to be shown.

    Attributes:
        path: the layer's full path in the model.
        kind: the path without the block's number, shared by the layers of equal place in every block.
        block: the first number in the path; None where there is none.
        singular_values: of the update, largest first.
        effective_rank: see ``effective_rank``.
        relative_norm: norm of the update over norm of the base weight; None if the latter is unknown or 0.
    """

    path: str
    kind: str
    block: int | None
    singular_values: tuple[float, ...]
    effective_rank: float
    relative_norm: float | None

    @property
    def largest(self) -> float:
        """The update's largest singular value (its spectral norm)."""
        return max(self.singular_values, default=0.0)


def learned_layers(spectra: Sequence[LayerSpectrum]) -> list[LearnedLayer]:
    """Describe every layer, layers of one kind together, kinds and blocks in the model's order."""
    split = [_split(spectrum.path) for spectrum in spectra]
    one_stem = len({stem for stem, block, _ in split if block is not None}) <= 1
    layers = []
    for spectrum, (stem, block, rest) in zip(spectra, split, strict=True):
        shown_stem = "" if one_stem and rest else stem
        kind = ".".join(part for part in (shown_stem, rest) if part) if block is not None else stem
        norm = spectrum.base_norm
        layers.append(
            LearnedLayer(
                path=spectrum.path,
                kind=kind,
                block=block,
                singular_values=tuple(sorted(spectrum.singular_values, reverse=True)),
                effective_rank=effective_rank(spectrum.singular_values),
                relative_norm=update_norm(spectrum.singular_values) / norm if norm else None,
            )
        )
    place = {kind: index for index, kind in enumerate(dict.fromkeys(layer.kind for layer in layers))}
    return sorted(layers, key=lambda layer: place[layer.kind])


def _split(path: str) -> tuple[str, int | None, str]:
    """Split ``model.layers.3.mlp.up`` into ``("model.layers", 3, "mlp.up")``."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return path, None, ""
