"""``Site``: one place in a model where an update acts, and how its path is read.

model.layers.0.q_proj            the weight of a layer that has one
lstm.weight_ih_l0                one of several weights of a layer
h.0.attn.c_attn[q]               a part of a fused projection; also by rows: c_attn[0:768]
embed_tokens[32000:32010]        some tokens of an embedding
mlp.experts.gate_up_proj         a stack of matrices, one update each
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.errors import ShapeError, TargetError, did_you_mean, quoted
from lorakit.layers.fused import fused_parts
from lorakit.layers.ops import LayerOps, Runs, find_ops, is_matrix, num_rows, ops_for
from lorakit.layers.parameter import ParameterOps
from lorakit.layers.parts import part_of

# Known names only, so that a glob's character class ('fc[12]') is not taken for parts.
PART = re.compile(r"(?P<path>.+)\[(?P<parts>(?:[qkv]|gate|up|\d+:\d+)(?:\s*,\s*(?:[qkv]|gate|up|\d+:\d+))*)\]")


@dataclass(frozen=True)
class Site:
    """A weight that an update belongs to.

    Attributes:
        path: its name in the model, see above; for a layer with one weight that of ``named_modules()``.
        layer: the layer itself, adapted or not.
        ops: how to multiply by its weight.
        host: the layer's path.
        runs: which rows of the matrix, where it is a part; None for all.
    """

    path: str
    layer: nn.Module
    ops: LayerOps
    host: str
    runs: Runs | None = None

    @classmethod
    def at(cls, model: nn.Module, path: str) -> Site:
        """Make the site at ``path``.

        Raises:
            UnsupportedLayerError: the layer's kind or options cannot be adapted.
            TargetError: the layer has several weights and none is named, or not this one.
        """
        part = PART.fullmatch(path)
        if part is not None:
            return part_site(model, cls.at(model, part["path"]), part["parts"])
        host, _, name = path.rpartition(".")
        outer = find_ops(model.get_submodule(host)) if host else None
        if outer is not None:
            layer = model.get_submodule(host)
            places = ops_for(host, layer).places(layer)
            if name in places:
                return cls(path, layer, places[name], host)
            if "" not in places:
                raise TargetError(f"'{host}' has no weight '{name}'.{did_you_mean(name, places)} {_has(places)}")
            if name == outer.parameter:  # PEFT's way to name the one weight of a layer
                return cls.at(model, host)
        elif host and is_matrix(model.get_submodule(host)._parameters.get(name)):
            return cls(path, model.get_submodule(host), ParameterOps(name), host)
        layer = model.get_submodule(path)
        places = ops_for(path, layer).places(layer)
        if "" not in places:
            raise TargetError(f"'{path}' has several weights: name one. {_has(places)}")
        return cls(path, layer, places[""], path)

    @property
    def place(self) -> str:
        """The name of the weight (or part) at its layer: 'weight', 'weight_ih_l0', '[q]'."""
        return self.path.removeprefix(self.host).removeprefix(".") or "weight"

    @property
    def d_out(self) -> int:
        """Rows of the weight as a matrix."""
        return self.ops.dims(self.layer)[0]

    @property
    def d_in(self) -> int:
        """Columns of the weight as a matrix."""
        return self.ops.dims(self.layer)[1]

    @property
    def stack(self) -> tuple[int, ...]:
        """``(E,)`` where the weight is a stack of ``E`` matrices, else ``()``."""
        return self.ops.stack(self.layer)

    def matrix(self) -> Tensor:
        """Return the base weight as ``[d_out, d_in]`` in its own dtype, detached."""
        return self.ops.as_matrix(self.layer, self.ops.weight(self.layer).detach())


def _has(places: Mapping[str, LayerOps]) -> str:
    return f"It has {quoted(sorted(places))}."


def sites_of(path: str, layer: nn.Module) -> dict[str, Site]:
    """Return every whole weight of one layer that can be updated, by path; none of a layer that cannot be adapted."""
    ops = find_ops(layer)
    if ops is None or ops.refusal(layer) is not None:
        return {}
    sites = [Site(f"{path}.{n}" if n else path, layer, inner, path) for n, inner in ops.places(layer).items()]
    return {site.path: site for site in sites}


def part_site(model: nn.Module, whole: Site, part: str) -> Site:
    """Return the site of one part of a whole one: a name, or rows ``start:stop,...``, of an embedding its tokens.

    Raises:
        UnsupportedLayerError: how the projection is split is not known.
        TargetError: there is no such part.
        ShapeError: rows that the matrix does not have.
    """
    size, word = (whole.d_in, "tokens") if whole.ops.input_is_index else (whole.d_out, "rows")
    if part[0].isdigit():
        runs = runs_of(part)
        if any(not start < stop <= size for start, stop in runs):
            raise ShapeError(f"'{whole.path}[{part}]': there are {word} 0 to {size}.")
        if any(start < stop for (_, stop), (start, _) in itertools.pairwise(runs)):
            raise ShapeError(f"'{whole.path}[{part}]': give {word} in rising order, each once.")
        part = spelled(runs)
    else:
        known = parts_at(model, whole)
        if part not in known:
            raise TargetError(f"'{whole.path}' has no part '{part}'. It has {quoted(list(known))}.")
        runs = known[part]
    if num_rows(runs) == size:
        return whole
    return Site(f"{whole.path}[{part}]", whole.layer, part_of(whole.ops, runs), whole.host, runs)


def runs_of(part: str) -> Runs:
    """Read rows as they stand in brackets: ``3:5,9:12``."""
    pairs = (run.partition(":") for run in part.split(","))
    return tuple((int(start), int(stop)) for start, _, stop in pairs)


def spelled(runs: Runs) -> str:
    """Write rows as they stand in brackets."""
    return ",".join(f"{start}:{stop}" for start, stop in runs)


def parts_at(model: nn.Module, whole: Site) -> Mapping[str, Runs]:
    """Return the parts of a fused projection: rows by name.

    Raises:
        UnsupportedLayerError: how it is split is not known.
    """
    own = whole.ops.parts(whole.layer)
    if own:
        return own
    parent, _, name = whole.path.rpartition(".")
    return fused_parts(model.get_submodule(parent), name, whole.path, whole.d_out)
