"""Inside low-rank updates, from the factors alone: singular values and directions, and how they lie.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular value decomposition of the small matrix
``R_B R_A^T = U' S V'^T`` (``[rank, rank]``) gives that of the update: ``B A = (Q_B U') S (Q_A V')^T``. No dense
``[d_out, d_in]`` matrix is made. Every function takes stacks of matrices (a leading dimension ``[E]``) as well,
unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from lorakit.adapters.handle import Handle
from lorakit.adapters.state import SiteState
from lorakit.errors import ShapeError
from lorakit.inits.svd import Directions as Directions
from lorakit.inits.svd import top_directions as top_directions
from lorakit.layers import Site
from lorakit.methods import Method
from lorakit.methods.lora import LoRA
from lorakit.methods.vera import VeRA
from lorakit.records import BaseOverlap, LayerSimilarity, LayerSpectrum, SimilarityAt

Pair = tuple[Tensor, Tensor]
"""Factors ``A[rank, d_in]``, ``B[d_out, rank]`` with the scale and every gain in them: the update is ``B A``."""

# A row's own norm is kept in DoRA's files beside the pair; it is no part of the low-rank update.
_BESIDE_THE_PAIR = frozenset({"magnitude"})


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return the singular values of ``B A``, largest first.

    >>> [round(v, 4) for v in singular_values(torch.eye(2, 5), 3.0 * torch.eye(4, 2)).tolist()]
    [3.0, 3.0]

    Args:
        A: ``[rank, d_in]``.
        B: ``[d_out, rank]``.

    Returns:
        ``[min(rank, d_in, d_out)]``, fp32.
    """
    left = torch.linalg.qr(B.float(), mode="r").R
    right = torch.linalg.qr(A.float().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def decompose(A: Tensor, B: Tensor) -> Directions:
    """Return the singular directions and values of ``B A``, in fp32, or in fp64 of fp64 factors.

    Args:
        A: ``[rank, d_in]``.
        B: ``[d_out, rank]``.
    """
    wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    Q_B, R_B = torch.linalg.qr(B.to(wide))
    Q_A, R_A = torch.linalg.qr(A.to(wide).mT)
    left, values, right = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Directions(Q_B @ left, values, Q_A @ right.mT)


def num_directions(values: Tensor) -> int:
    """Return how many of one matrix's singular values (``[r]``, largest first) are more than fp32's rounding."""
    if not values.numel():
        return 0
    floor = 4 * len(values) * torch.finfo(torch.float32).eps * values[0]
    return int((values > floor).sum())


def shares_inside(update: Directions, base: Directions) -> tuple[Tensor, Tensor, Tensor]:
    """Return which shares of an update lie in a base weight's directions ``U_k``, ``V_k``.

    Args:
        update: of the update ``dW``, all of it.
        base: the base weight's first ones.

    Returns:
        ``||U_k^T dW||^2``, ``||dW V_k||^2`` and ``||U_k^T dW V_k||^2``, each over ``||dW||^2``, in [0, 1]; NaN for an
        update that is zero.
    """
    energy = update.values.square()
    whole = energy.sum(-1)
    left = base.left.mT @ update.left
    right = base.right.mT @ update.right
    outputs = (left.square().sum(-2) * energy).sum(-1) / whole
    inputs = (right.square().sum(-2) * energy).sum(-1) / whole
    both = ((left * update.values[..., None, :]) @ right.mT).square().sum((-2, -1)) / whole
    return outputs.clamp(max=1.0), inputs.clamp(max=1.0), both.clamp(max=1.0)


def projected_norm(W: Tensor, update: Directions) -> Tensor:
    """Return ``||U^T W V||_F``, what a base weight has in an update's directions (Hu et al. 2021, table 7)."""
    norm: Tensor = torch.linalg.matrix_norm((update.left.mT @ W.float()) @ update.right)
    return norm


@torch.no_grad()
def overlap_with_base(update: Directions, W: Tensor) -> BaseOverlap | None:
    """Say how an update of one matrix lies to its base weight; None for an update that is zero.

    For random directions: a share of ``k / d`` on each side, their product on both; and
    ``E ||U^T W V||^2 = k^2 ||W||^2 / (d_out d_in)``.

    Args:
        update: its directions, all of them.
        W: the base weight, ``[d_out, d_in]``.
    """
    count = num_directions(update.values)
    if count == 0:
        return None
    update, W = update.first(count), W.float()
    base = top_directions(W, count)
    outputs, inputs, both = (float(share) for share in shares_inside(update, base))
    d_out, d_in = W.shape
    norm = float(torch.linalg.vector_norm(update.values))
    projected = float(projected_norm(W, update))
    by_chance = count * float(torch.linalg.vector_norm(W)) / math.sqrt(d_out * d_in)
    return BaseOverlap(
        num_directions=count,
        outputs=outputs,
        inputs=inputs,
        both=both,
        outputs_random=count / d_out,
        inputs_random=count / d_in,
        both_random=count * count / (d_out * d_in),
        projected=projected,
        projected_random=by_chance,
        base_projected=float(torch.linalg.vector_norm(base.values)),
        amplification=norm / projected if projected > 0.0 else None,
        amplification_random=norm / by_chance if by_chance > 0.0 else None,
    )


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the Grassmann similarity ``||U^T V||_F^2 / min(i, j)`` in [0, 1] (Hu et al. 2021, eq. 4).

    1 where one subspace contains the other, 0 where they are orthogonal, ``max(i, j) / n`` on average
    for random ones.

    Args:
        first: orthonormal columns ``[n, i]``.
        second: ``[n, j]``.
    """
    overlap = (first.mT @ second).square().sum((-2, -1))
    return (overlap / min(first.shape[-1], second.shape[-1])).clamp(max=1.0)


@torch.no_grad()
def similarities(path: str, first: Pair, second: Pair) -> list[LayerSimilarity]:
    """Compare two adapters' updates of one layer: one result, or one per matrix of a stack.

    With r and r' directions that are not zero the similarity is taken at (1, 1), (2, 2), (4, 4), ... up to the
    smaller of them, and at (r, r').

    Raises:
        ShapeError: the updates are of different sizes.
    """
    here, there = size_of(first), size_of(second)
    if here != there:
        raise ShapeError(f"'{path}' is {in_words(here)} in one adapter and {in_words(there)} in the other")
    pairs = [(_one(first, expert), _one(second, expert)) for expert in _experts(first)]
    return [
        LayerSimilarity(path, _similarity_at(*pair), expert)
        for pair, expert in zip(pairs, _experts(first), strict=True)
    ]


def _similarity_at(first: Pair, second: Pair) -> tuple[SimilarityAt, ...]:
    ours, theirs = decompose(*first), decompose(*second)
    here, there = num_directions(ours.values), num_directions(theirs.values)
    shorter = min(here, there)
    if shorter == 0:
        return ()
    both = [2**n for n in range(shorter.bit_length()) if 2**n < shorter] + [shorter]
    sides = (
        (_columns(first[0].mT), _columns(second[0].mT)),
        (_columns(first[1]), _columns(second[1])),
        (ours.right, theirs.right),
        (ours.left, theirs.left),
    )
    found = []
    for i, j in dict.fromkeys([*((rank, rank) for rank in both), (here, there)]):
        alike = (float(subspace_similarity(one[:, :i], other[:, :j])) for one, other in sides)
        by_chance = (max(i, j) / side[0].shape[0] for side in (sides[0], sides[1]))
        found.append(SimilarityAt(i, j, *alike, *by_chance))
    return tuple(found)


def _columns(factor: Tensor) -> Tensor:
    """Return the left singular directions of ``[n, rank]``, in the order of their singular values."""
    left: Tensor = torch.linalg.svd(factor.float(), full_matrices=False).U
    return left


def size_of(pair: Pair) -> tuple[int, ...]:
    """Return ``(d_out, d_in)`` of a pair's product, with the number of matrices of a stack in front."""
    A, B = pair
    return (*B.shape[:-1], A.shape[-1])


def in_words(size: tuple[int, ...]) -> str:
    """Write a size as ``10 x 6``."""
    return " x ".join(str(number) for number in size)


def low_rank_pair(
    method: Method,
    path: str,
    site: SiteState,
    dtype: torch.dtype = torch.float32,
    shared: Mapping[str, Tensor] = MappingProxyType({}),
) -> Pair | None:
    """Return a saved site's factors with the scale in them, as ``Terms.low_rank`` does of a live one.

    None where the tensors alone do not say what the update is: of methods that are not LoRA with a scale or VeRA, and
    of sites without a pair. Those need the model.

    Args:
        method: the adapter's method.
        path: the site's path.
        site: its tensors.
        dtype: of the factors.
        shared: the adapter's shared tensors.
    """
    if isinstance(method, VeRA):
        d_in = _num_inputs(site, site.tensors["b"])
        return method.pair(site.tensors, shared, d_in, dtype) if shared and d_in else None
    A, B = site.tensors.get("A"), site.tensors.get("B")
    if A is None or B is None or not isinstance(method, LoRA) or set(site.tensors) - {"A", "B"} - _BESIDE_THE_PAIR:
        return None
    return A.to(dtype), B.to(dtype) * method.scale_at(path, A.shape[-2])


def _num_inputs(site: SiteState, b: Tensor) -> int:
    """Return the ``d_in`` of a site whose ``b`` has one number for each row of each matrix; 0 where it is not known."""
    shape = site.weight_shape
    if site.runs is None:
        return math.prod(shape) // b.numel()
    return shape[0] if site.kind == "transposed" else math.prod(shape[1:]) if b.dim() == 1 else 0


@torch.no_grad()
def layer_spectra(path: str, pair: Pair, W: Tensor | None = None, *, overlap: bool = False) -> list[LayerSpectrum]:
    """Describe the update of one layer: one result, or one per matrix of a stack.

    Args:
        path: the layer's path.
        pair: its factors.
        W: the base weight as a matrix, if it is at hand; one matrix at a time is taken to fp32.
        overlap: also say how the update lies to the base weight's directions, which takes a weight of 4096 x 4096
            about half a second.
    """
    if W is not None and (*W.shape,) != size_of(pair):
        raise ShapeError(f"'{path}' is {in_words(size_of(pair))} in the adapter, {in_words((*W.shape,))} in the base")
    update = decompose(*pair) if overlap and W is not None else None
    values = update.values if update is not None else singular_values(*pair)
    found = []
    for expert in _experts(pair):
        weight = W if expert is None or W is None else W[expert]
        norm = against = None
        if weight is not None:
            norm = float(torch.linalg.vector_norm(weight, dtype=torch.float32))
            against = overlap_with_base(update.at(expert), weight) if update is not None else None
        numbers = tuple((values if expert is None else values[expert]).tolist())
        found.append(LayerSpectrum(path, numbers, norm, expert, pair[1].shape[-2], pair[0].shape[-1], against))
    return found


def _experts(pair: Pair) -> Sequence[int | None]:
    return (None,) if pair[0].dim() == 2 else range(pair[0].shape[0])


def _one(pair: Pair, expert: int | None) -> Pair:
    return pair if expert is None else (pair[0][expert], pair[1][expert])


@torch.no_grad()
def spectra(handle: Handle, name: str | None = None) -> tuple[LayerSpectrum, ...]:
    """Return the singular values of every layer's low-rank update and its base weight's Frobenius norm."""
    found: list[LayerSpectrum] = []
    for path, site, pair in low_rank_updates(handle, name):
        found += layer_spectra(path, pair, site.matrix())
    return tuple(found)


def low_rank_updates(handle: Handle, name: str | None = None) -> Iterator[tuple[str, Site, Pair]]:
    """Yield path, site and factors of every low-rank update of a live adapter."""
    for path, update in handle.updates(name).items():
        site = Site.at(handle.model, path)
        terms = update.terms(site.ops, site.layer)
        if terms.A is not None:
            yield path, site, terms.low_rank()
