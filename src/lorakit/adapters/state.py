"""``AdapterState``: a saved adapter as plain data. Formats and composition read it; it sees no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.adapters.identity import Identity
from lorakit.layers.ops import Runs
from lorakit.methods import Method


@dataclass(frozen=True)
class SiteState:
    """One site's tensors.

    Attributes:
        kind: the layer's kind (``LayerOps.kind``); 'linear' from a file that does not tell 'transposed'.
        weight_shape: the base weight's native shape where it is known (a convolution's kernel is needed
            to write it), else ``(d_out, d_in)``.
        tensors: by name, as matrices: ``A[rank, d_in]``, ``B[d_out, rank]``, and the method's others; with the
            leading dimension ``[E]`` where the weight is a stack.
        runs: which rows ``[start, stop)`` of the weight as a matrix, where the site is a part of a fused one.
        options: what else decides the matrix's meaning, where it is not the default: a convolution's groups,
            dilation and padding mode; ``transposed`` of a parameter that is stored as ``[..., d_in, d_out]``.
    """

    kind: str
    weight_shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    runs: Runs | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterState:
    """Everything an adapter is.

    Attributes:
        method: the method with its settings.
        sites: tensors by layer path, those of one module in the order of its parameters.
        biases: the adapter's own bias copies by layer path, ``[d_out]``, or ``[E, d_out]`` of a stack.
        modules: modules trained in full: tensors by name, by path of the module that holds them.
        rows: rows of tokens trained whole, by path with the rows in brackets: ``rows[n, width]`` each, ``runs`` saying
            which; of tied tables under the first path alone.
        parts: tensors of parts that act on the model as a whole, by part name and tensor name.
        shared: frozen tensors that several sites' updates read, by name; empty where the method's seed draws them.
        targets: names that, matched as exact paths or suffixes, mean the sites.
        full_modules: the names of the modules trained in full, as chosen.
        identity: which base it belongs to; None where a file does not say.
        base_name: the base's name or folder as the user called it, if known.
    """

    method: Method
    sites: Mapping[str, SiteState]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    rows: Mapping[str, SiteState] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    full_modules: tuple[str, ...] = ()
    identity: Identity | None = None
    base_name: str | None = None
