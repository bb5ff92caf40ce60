"""Several adapters of one batch at one linear layer: those that are plain pairs go through one routed product.

Pairs that nothing trains now are kept from one forward to the next, so that decoding neither rounds nor joins
them again for every token. They are made anew where a factor is another tensor, lies elsewhere or was written to,
or an optimizer has taken a step, and dropped where an adapter is removed. What is written past autograd into the
same memory (``parameter.data.copy_``) is not seen.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from lorakit.kernels import fast
from lorakit.kernels.routed import Pairs
from lorakit.kernels.routed_product import add_products, add_trained
from lorakit.kernels.steps import optimizer_steps
from lorakit.layers import BranchOps, Terms
from lorakit.layers.linear import LinearOps
from lorakit.methods import Update
from lorakit.methods.lora import LowRankUpdate

if TYPE_CHECKING:
    from lorakit.adapters.branches import Branches
    from lorakit.adapters.routing import Routing


@dataclass(frozen=True)
class Acting:
    """The pairs that act at one host.

    Attributes:
        names: their adapters; ``rest`` those whose update is more than a pair.
        updates: theirs, in order.
        A, B, scales: theirs, in order; the strengths are in the scales.
    """

    names: tuple[str, ...]
    rest: tuple[str, ...]
    updates: tuple[Update, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scales: tuple[float, ...]

    def trains(self) -> bool:
        """Tell whether gradients are wanted in any factor."""
        return any(factor.requires_grad for factor in (*self.A, *self.B))


class Kept:
    """Pairs, and what they were made from."""

    def __init__(self, asked: tuple[Any, ...], acting: Acting, updates: Sequence[LowRankUpdate], pairs: Pairs) -> None:
        self.acting, self.pairs = acting, pairs
        self._asked = asked
        self._updates = updates
        self._parameters = [update._parameters for update in updates]
        self._dropping = [update for update in updates if update.dropout > 0.0]
        self._steps = optimizer_steps()
        self._scales = [update.scale for update in updates]
        self._factors = self._read()
        self._versions = [factor._version for factor in self._factors]
        # Held, so that a parameter that is given other memory is never given this again.
        self._memory = [factor.detach() for factor in self._factors]
        self._addresses = [factor.data_ptr() for factor in self._memory]

    def is_current(self, asked: tuple[Any, ...]) -> bool:
        """Tell whether the same pairs would be made again."""
        if asked != self._asked or self._steps != optimizer_steps():
            return False
        factors = self._read()
        return (
            all(map(operator.is_, factors, self._factors))
            and [factor._version for factor in factors] == self._versions
            and [factor.data_ptr() for factor in factors] == self._addresses
            and [update.scale for update in self._updates] == self._scales
            and not any(update.training for update in self._dropping)
        )

    def _read(self) -> list[Any]:
        found = [parameters["A"] for parameters in self._parameters]
        found += [parameters["B"] for parameters in self._parameters]
        return found


class Together:
    """What a host keeps of the adapters that act in one batch: the last ones' pairs. Copied and pickled empty."""

    def __init__(self) -> None:
        self.kept: Kept | None = None

    def __deepcopy__(self, memo: Any) -> Together:
        return Together()

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, ()

    def clear(self) -> None:
        """Forget them."""
        self.kept = None

    def pairs(
        self,
        host: nn.Module,
        ops: LinearOps,
        updates: Mapping[str, Update | None],
        strengths: Sequence[float],
        out: Tensor,
    ) -> tuple[Acting, Pairs | None]:
        """Return the pairs that act, made from the updates; without :class:`Pairs` where gradients are wanted."""
        asked = (tuple(updates), tuple(map(id, updates.values())), tuple(strengths), out.dtype, out.device)
        kept, grad = self.kept, torch.is_grad_enabled()
        if kept is not None and kept.is_current(asked):
            return kept.acting, None if grad and kept.acting.trains() else kept.pairs
        acting = _acting(host, ops, updates, strengths)
        if not acting.names or (grad and acting.trains()):
            self.clear()
            return acting, None
        with torch.no_grad():
            pairs = Pairs(acting.A, acting.B, acting.scales, out.dtype)
        plain = [update for update in acting.updates if _is_plain(update)]
        keeps = len(plain) == len(acting.updates) and not any(map(Tensor.is_inference, (*acting.A, *acting.B)))
        self.kept = Kept(asked, acting, plain, pairs) if keeps else None
        return acting, pairs


def add_together(
    branches: Branches, routing: Routing, host: nn.Module, x: Tensor, base_out: Tensor, names: tuple[str, ...]
) -> tuple[Tensor, tuple[str, ...]]:
    """Add the differences of all adapters that are plain pairs at a linear host, to their rows.

    Args:
        branches: the host's.
        routing: whose rows are whose.
        host: the layer.
        x: its input.
        base_out: what the base computed of it; written in place.
        names: adapters of the routing that have a part here.

    Returns:
        The output, and the adapters whose differences are still to be added.
    """
    ops = branches.ops
    if not isinstance(ops, LinearOps) or not fast() or torch.compiler.is_compiling() or not base_out.is_contiguous():
        return base_out, names
    strengths = [branches.active.strengths.get(name, 1.0) for name in names]
    updates = {name: branches.plain_update(name) for name in names}
    acting, pairs = branches.together.pairs(host, ops, updates, strengths, base_out)
    if not acting.names:
        return base_out, acting.rest
    segments = routing.segments(acting.names, ops.positions(host, x), x.device)
    if torch.is_grad_enabled() and (pairs is None or x.requires_grad or base_out.requires_grad):
        return add_trained(base_out, x, acting.A, acting.B, acting.scales, segments), acting.rest
    assert pairs is not None
    rows = x.reshape(-1, x.shape[-1]).to(base_out.dtype)
    add_products(base_out.view(-1, base_out.shape[-1]), rows, pairs, segments)
    return base_out, acting.rest


def _acting(
    host: nn.Module, ops: BranchOps, updates: Mapping[str, Update | None], strengths: Sequence[float]
) -> Acting:
    """Take apart which updates are plain pairs."""
    found: list[tuple[str, Update, Tensor, Tensor, float]] = []
    rest = []
    for (name, update), strength in zip(updates.items(), strengths, strict=True):
        terms = None if update is None else update.terms(ops, host)
        if update is None or terms is None or not _is_pair(terms, update.training):
            rest.append(name)
            continue
        assert terms.A is not None
        assert terms.B is not None
        found.append((name, update, terms.A, terms.B, terms.scale * strength))
    names, own, A, B, scales = zip(*found, strict=True) if found else ((), (), (), (), ())
    return Acting(names, tuple(rest), own, A, B, scales)


def _is_pair(terms: Terms, training: bool) -> bool:
    drops = training and terms.dropout > 0.0
    return terms.is_pair and not drops and terms.row_scale is None and terms.bias_shift is None


def _is_plain(update: Update) -> TypeGuard[LowRankUpdate]:
    """Tell whether an update's pair follows from its own two parameters and its scale alone."""
    if not isinstance(update, LowRankUpdate) or update.A0 is not None:
        return False
    kind = type(update)
    return kind.terms is LowRankUpdate.terms and kind.factors is LowRankUpdate.factors
