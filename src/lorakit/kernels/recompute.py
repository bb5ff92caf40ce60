"""Keeping less for the backward pass: what a cheap operation made is made again, by the same operation.

Autograd keeps the inputs of each operation. Many of them are results of elementwise operations on other tensors that it
keeps too: of ``silu(gate) * up``, which goes into an MLP's last product, it keeps gate, up, silu(gate) and the product,
though the first two are enough; of a norm the input in fp32, though the input was bf16. Within
:func:`recomputing` each tensor to be kept is looked at: the graph says which operation made it. Where its operands are
kept anyhow only how to make it again is kept, and a cast up from a narrower type is kept in that type. Both give the
very same bits, so gradients do not change by a bit, and no model is asked how it is built.

No product of matrices is done again. (Dropping what is cheap to make: Chen et al. 2016, arXiv 1604.06174, section 3;
by layer and by hand: Korthikanti et al. 2022, arXiv 2205.05198.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.kernels.dropout import is_real

SMALLEST_BYTES = 32 * 2**10
"""Smaller tensors are kept as they are: to make them again takes longer than to read them."""

DEEPEST = 8
"""So many operations in a row are done again at most."""

KEPT = "lorakit kept"
"""Under this name a node of the graph knows what is kept of its outputs, as long as an operation needs it."""


def recomputing() -> saved_tensors_hooks:
    """Return a context in which graphs keep what they need, and make the rest again in their backward pass.

    Raises:
        RuntimeError: in the backward pass, where a kept tensor was written to meanwhile.
    """
    return saved_tensors_hooks(_pack, _unpack)


class _Kept:
    """A tensor as it came, or in a narrower type that holds the same values."""

    __slots__ = ("__weakref__", "dtype", "tensor", "version")

    def __init__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        # Detached: an operation's own result would hold its node, which holds this.
        self.tensor, self.version, self.dtype = tensor.detach(), tensor._version, dtype

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that the backward pass needs was written to after it was used "
                f"(shape {list(self.tensor.shape)}, version {self.tensor._version}, expected {self.version})"
            )
        return self.tensor if self.dtype is None else self.tensor.to(self.dtype)


class _Remade:
    """A tensor that is made again; what another one's making computed waits for its own reader."""

    __slots__ = ("make", "shape", "waiting")

    def __init__(self, make: Make, shape: torch.Size) -> None:
        self.make, self.shape = make, shape
        self.waiting: Tensor | None = None

    def value(self) -> Tensor:
        if self.waiting is not None:
            found = self.waiting
        else:
            _depth.count += 1
            try:
                with torch.no_grad():
                    found = self.make().view(self.shape)
            finally:
                _depth.count -= 1
        self.waiting = found if _depth.count else None
        return found


class _Depth(threading.local):
    count = 0


_depth = _Depth()


def _unpack(packed: _Kept | _Remade) -> Tensor:
    return packed.value()


def _pack(tensor: Tensor) -> _Kept | _Remade:
    node: Any = tensor.grad_fn
    if node is None or tensor.nbytes < SMALLEST_BYTES:
        return _Kept(tensor)
    number = tensor.output_nr
    make = _how(node, number, DEEPEST)
    if make is not None:
        return _Remade(make, tensor.shape)
    narrow = _narrower(node)
    packed = _Kept(tensor) if narrow is None else _Kept(tensor.detach().to(narrow), tensor.dtype)
    node.metadata.setdefault(KEPT, {})[number] = weakref.ref(packed)
    return packed


def _how(node: Any, number: int, depth: int) -> Make | None:
    """Return how to make a node's output from what is kept, or None where it cannot be made cheaply."""
    seen = node.metadata.get(KEPT, {}).get(number)
    kept: _Kept | None = None if seen is None else seen()
    if kept is not None:
        return kept.value
    rule = RULES.get(node.name())
    return None if rule is None or number or not depth else rule(node, depth - 1)


def _source(node: Any, i: int, depth: int) -> Make | None:
    """Return how to make an operation's operand."""
    before, number = node.next_functions[i]
    return None if before is None else _how(before, number, depth)


def _narrower(node: Any) -> torch.dtype | None:
    """Return the type that a tensor was cast up from."""
    if node.name() != "ToCopyBackward0":
        return None
    before, number = node.next_functions[0]
    if before is None:
        return None
    was, now = _dtype(before, number), _dtype(node, 0)
    narrow = was in (torch.bfloat16, torch.float16) and now in (torch.float32, torch.float64)
    return was if narrow else None


def _dtype(node: Any, number: int) -> torch.dtype:
    metadata = node._input_metadata
    found: torch.dtype = metadata[number].dtype if number < len(metadata) else node.variable.dtype
    return found


def _cast(node: Any, depth: int) -> Make | None:
    source = _source(node, 0, depth)
    dtype = _dtype(node, 0)
    return None if source is None else lambda: source().to(dtype)


def _view(node: Any, depth: int) -> Make | None:
    source = _source(node, 0, depth)
    shape = node._input_metadata[0].shape
    return None if source is None else lambda: source().reshape(shape)


def _product(node: Any, depth: int) -> Make | None:
    """A factor is kept where the other one takes a gradient."""
    dtype = _dtype(node, 0)
    takes = [before is not None for before, _ in node.next_functions]
    left = (lambda: node._saved_self) if takes[1] else _source(node, 0, depth)
    right = (lambda: node._saved_other) if takes[0] else _source(node, 1, depth)
    if left is None or right is None:
        return None
    return lambda: torch.mul(left(), right()).to(dtype)


def _silu(node: Any, depth: int) -> Make:
    return lambda: F.silu(node._saved_self)


def _gelu(node: Any, depth: int) -> Make:
    return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)


def _layer_norm(node: Any, depth: int) -> Make | None:
    eps = _epsilon(node)
    if eps is None:
        return None

    def make() -> Tensor:
        return F.layer_norm(node._saved_input, node._saved_normalized_shape, node._saved_weight, node._saved_bias, eps)

    return make


def _epsilon(node: Any) -> float | None:
    """Return the epsilon of a layer norm, which the graph does not have: that one which gives what it keeps.

    It is looked for once for each weight; of tensors without numbers the first is taken.
    """
    weight = node._saved_weight
    if weight is None:
        return None
    if weight not in _epsilons:
        _epsilons[weight] = next((eps for eps in EPSILONS if _gives(node, eps)), None)
    found: float | None = _epsilons[weight]
    return found


def _gives(node: Any, eps: float) -> bool:
    x, rstd = node._saved_input.detach(), node._saved_result2
    found = torch.native_layer_norm(x, node._saved_normalized_shape, None, None, eps)[2]
    return not is_real(x) or torch.equal(found, rstd)


EPSILONS = (1e-5, 1e-12, 1e-6, 1e-7, 1e-8)
"""Those that models are published with."""

_epsilons: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

Make = Callable[[], Tensor]
Rule = Callable[[Any, int], Make | None]

RULES: dict[str, Rule] = {
    "ToCopyBackward0": _cast,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
    "MulBackward0": _product,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
    "NativeLayerNormBackward0": _layer_norm,
}
"""The operations that are done again, and how; what they need is kept by themselves or by others."""
