"""``AdapterState``: a saved adapter as plain data. Formats and composition read it; it sees no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorakit.adapters.identity import Identity
from lorakit.methods import Method


@dataclass(frozen=True)
class SiteState:
    """One site's tensors.

    Attributes:
        kind: the layer's kind (``LayerOps.kind``); 'linear' from a file that does not tell 'transposed'.
        weight_shape: the base weight's native shape where it is known (a convolution's kernel is needed
            to write it), else ``(d_out, d_in)``.
        tensors: by name, as matrices: ``A[rank, d_in]``, ``B[d_out, rank]``, and the method's others.
    """

    kind: str
    weight_shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterState:
    """Everything an adapter is.

    Attributes:
        method: the method with its settings.
        sites: tensors by layer path.
        biases: the adapter's own bias copies by layer path, ``[d_out]``.
        modules: modules trained in full: tensors by name, by path of the module that holds them.
        parts: tensors of parts that act on the model as a whole, by part name and tensor name.
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
    targets: tuple[str, ...] = ()
    full_modules: tuple[str, ...] = ()
    identity: Identity | None = None
    base_name: str | None = None
