"""Which hosts take the fast path of linear layers, and how: their updates as pairs, several layers at a time.

A host takes it where all that acts on it is a pair, and the layer is a plain frozen product; everything else takes the
plain path (:func:`lorakit.layers.add_update`), which computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.kernels import fast
from lorakit.kernels.compiled import compiled_linear
from lorakit.kernels.linear import Linear, Pair, adapted_linears
from lorakit.layers.linear import LinearOps

if TYPE_CHECKING:
    from lorakit.adapters.branches import Branches
    from lorakit.adapters.readers import Readers


def fast_output(branches: Branches, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what an adapted linear layer gives for its input, or None where this path does not apply."""
    if not fast() or len(args) + len(kwargs) != 1:
        return None
    x = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(x, Tensor) or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return None
    if torch.compiler.is_compiling():
        return _for_compiler(branches, host, x)
    readers = branches.active.readers
    grad = torch.is_grad_enabled()  # without gradients layers compute one by one
    if grad and (ready := readers.take(host)) is not None:
        return ready
    own = _adapted(branches, host, x)
    if own is None:
        return None
    first, p = own
    if not grad:
        return _computed(x, [first], p, readers.seed() if p > 0.0 else 0)[0]

    def compute(members: Sequence[nn.Module]) -> list[Tensor | None]:
        layers: list[Linear | None] = [first]
        for member in members[1:]:
            branches = getattr(member, "lorakit", None)  # none where its adapters are gone meanwhile
            found = None if branches is None else _adapted(branches, member, x)
            layers.append(found[0] if found is not None and found[1] == p else None)
        seed = readers.seed() if p > 0.0 else 0
        outputs = iter(_computed(x, [layer for layer in layers if layer is not None], p, seed))
        return [None if layer is None else next(outputs) for layer in layers]

    return readers.outputs(host, compute)


def _for_compiler(branches: Branches, host: nn.Module, x: Tensor) -> Tensor | None:
    """Return a layer's output as one operation of the compiler's graph, where it has one pair and no gain.

    On a GPU the compiler makes kernels of the plain path, and what is exported is to need no operation of ours.
    """
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return None
    if any(update is None or update.scales_rows for update, _ in branches.plain_updates()):
        return None
    found = _adapted(branches, host, x)
    if found is None or len(found[0].pairs) != 1 or not torch.is_grad_enabled():
        return None
    return compiled_linear(x, *found)


def watch_output(branches: Branches, host: nn.Module, out: Any) -> None:
    """See whether a layer's output is left as it is by its users, where the fast path would depend on it."""
    if not fast() or torch.compiler.is_compiling() or not isinstance(branches.ops, LinearOps):
        return
    if isinstance(out, Tensor) and any(u is not None and u.scales_rows for u, _ in branches.plain_updates()):
        branches.active.readers.watch(host, out)


def _adapted(branches: Branches, host: nn.Module, x: Tensor) -> tuple[Linear, float] | None:
    """Return a host as a linear layer with its pairs, and their dropout, or None where it is more than that."""
    if not isinstance(branches.ops, LinearOps):
        return None
    weight = branches.ops.weight(host)
    if weight.requires_grad or weight.dtype != x.dtype or weight.device != x.device or _is_exotic(weight):
        return None
    bias = branches.ops.bias(host)
    if bias is not None and bias.requires_grad:
        return None
    pairs: list[Pair] = []
    rates: set[float] = set()
    gain: Tensor | None = None
    acting = list(branches.plain_updates())
    for update, strength in acting:
        alone = strength == 1 and len(acting) == 1
        if update is None or (update.scales_rows and not (alone and _can_use_output(host, branches.active.readers))):
            return None
        terms = update.terms(branches.ops, host)
        if not terms.is_pair:
            return None
        assert terms.A is not None
        assert terms.B is not None
        pairs.append(Pair(terms.A, terms.B, terms.scale * strength))
        rates.add(terms.dropout if update.training else 0.0)
        gain = None if terms.row_scale is None else terms.row_scale.to(x.dtype)
        if terms.bias_shift is not None:
            shift = (strength * terms.bias_shift).to(x.dtype)
            bias = shift if bias is None else bias + shift
    if not pairs or len(rates) > 1:
        return None
    return Linear(branches.ops.as_matrix(host, weight), bias, pairs, gain), rates.pop()


def _can_use_output(host: nn.Module, readers: Readers) -> bool:
    """Tell whether a gain's gradient may be taken from the layer's output.

    Without gradients there is nothing to win, and a loaded adapter is to give the bits of the trained one.
    """
    return torch.is_grad_enabled() and readers.keeps_output(host)


def _computed(x: Tensor, layers: Sequence[Linear], p: float, seed: int) -> Sequence[Tensor]:
    """Return the layers' outputs: from Triton's kernels where these are asked for, else from torch's products."""
    if x.is_cuda and all(_suits_triton(layer) for layer in layers):
        from lorakit.kernels import triton

        if triton.applies(x):
            from lorakit.kernels.triton.linear import Adapted, adapted_linear

            given = [Adapted(each.W, each.bias, pair.A, pair.B, pair.scale) for each in layers for pair in each.pairs]
            return adapted_linear(x, given, p, torch.tensor(seed, device=x.device) if p > 0.0 else None)
    return adapted_linears(x, layers, p, seed)


def _suits_triton(layer: Linear) -> bool:
    return len(layer.pairs) == 1 and layer.gain is None and (layer.bias is None or not layer.bias.requires_grad)


def _is_exotic(weight: Tensor) -> bool:
    """Tell whether a weight multiplies in a way of its own (a quantised tensor)."""
    if type(weight) in (Tensor, nn.Parameter):
        return False
    from torch._subclasses import FakeTensor

    return type(weight) is not FakeTensor
