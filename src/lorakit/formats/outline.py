"""What a saved adapter holds: its method, its layers with shapes and ranks, and the base it belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.spectrum import low_rank_pair, singular_values
from lorakit.adapters.state import AdapterState, SiteState
from lorakit.formats.peft import TENSORS
from lorakit.formats.store import read_adapter


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of a saved adapter.

    Attributes:
        path: the layer's path in its base.
        kind: the layer's kind.
        d_out, d_in: of the update as a matrix ``[d_out, d_in]``; ``rank`` its inner size, 0 where it has none.
        num_parameters: numbers that were trained for it.
        singular_values: of the update with its scale, largest first; of a stack of matrices the median over
            them. Empty where the method's tensors alone do not say what the update is.
    """

    path: str
    kind: str
    d_out: int
    d_in: int
    rank: int
    num_parameters: int
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class FullModule:
    """A module trained in full, or rows of tokens: its path and its numbers."""

    path: str
    num_parameters: int


@dataclass(frozen=True)
class AdapterOutline:
    """A saved adapter, read without its base.

    Attributes:
        folder: where it is.
        method: the method's name and settings.
        base_name: the base as it was called, None where the file does not say.
        identity: short id of the base; None for a file that carries none.
        dtype: what most numbers are stored in.
        num_bytes: size of the file of tensors.
        num_parameters: numbers in the adapter.
        layers: the adapted layers; ``modules`` those trained in full; ``rows`` the tokens whose rows are;
            ``num_biases`` trained biases.
    """

    folder: str
    method: dict[str, Any]
    base_name: str | None
    identity: str | None
    dtype: str
    num_bytes: int
    num_parameters: int
    layers: tuple[AdaptedLayer, ...]
    modules: tuple[FullModule, ...]
    num_biases: int
    rows: tuple[FullModule, ...] = ()


def describe_adapter(folder: str | Path) -> AdapterOutline:
    """Outline the adapter saved in ``folder``; its base is not needed.

    Raises:
        FormatError: there is none, or it is broken, unsafe or uses what is not supported.
    """
    folder = Path(folder).expanduser()
    state = read_adapter(folder)
    return AdapterOutline(
        folder=str(folder),
        method=state.method.summary(),
        base_name=state.base_name,
        identity=state.identity.short if state.identity is not None else None,
        dtype=_dtype(state),
        num_bytes=(folder / TENSORS).stat().st_size,
        num_parameters=sum(tensor.numel() for tensor in _tensors(state)),
        layers=tuple(_layer(state, path, site) for path, site in state.sites.items()),
        modules=tuple(FullModule(p, sum(t.numel() for t in group.values())) for p, group in state.modules.items()),
        num_biases=len(state.biases),
        rows=tuple(FullModule(p, sum(t.numel() for t in site.tensors.values())) for p, site in state.rows.items()),
    )


def _layer(state: AdapterState, path: str, site: SiteState) -> AdaptedLayer:
    numbers = sum(tensor.numel() for tensor in site.tensors.values())
    pair = low_rank_pair(state.method, path, site, shared=state.shared)
    A, B = (site.tensors.get("A"), site.tensors.get("B")) if pair is None else pair
    if A is None or B is None:
        d_out, d_in = site.weight_shape[0], math.prod(site.weight_shape[1:])
        return AdaptedLayer(path, site.kind, d_out, d_in, 0, numbers, ())
    values = () if pair is None else tuple(_of_one(singular_values(*pair)).tolist())
    return AdaptedLayer(path, site.kind, B.shape[-2], A.shape[-1], A.shape[-2], numbers, values)


def _of_one(values: torch.Tensor) -> torch.Tensor:
    return values if values.dim() == 1 else values.median(dim=0).values


def _tensors(state: AdapterState) -> list[torch.Tensor]:
    sites = [*state.sites.values(), *state.rows.values()]
    groups = [*(site.tensors for site in sites), *state.modules.values(), *state.parts.values()]
    return [tensor for group in [*groups, state.biases] for tensor in group.values()]


def _dtype(state: AdapterState) -> str:
    words = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    numbers: dict[torch.dtype, int] = {}
    for tensor in _tensors(state):
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
    most = max(numbers, key=lambda dtype: numbers[dtype])
    return words.get(most, str(most).removeprefix("torch."))
