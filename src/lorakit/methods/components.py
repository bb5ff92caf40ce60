"""Updates made of components: ``scale * sum_i E_i b_i a_i``, of which some can go and others can come while they train.

    W' = W0 + scale * B diag(E) A,     A[rank, d_in], E[rank], B[d_out, rank], E = 0 at the start

This is the singular value form of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, eq. 3) and of IncreLoRA (Zhang et al.
2023, arXiv 2308.12043): the rows of A and the columns of B are kept near orthonormal, so that each component stands for
a direction of its own. What acts, and what is saved, is the plain pair ``diag(E) A``, ``B``.

Of a stack of matrices (experts) a component is one of every matrix: their ranks stay common.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.errors import ConfigError, ShapeError, bullet_list, quoted
from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.blank import Blank
from lorakit.methods.lora import Alpha, LoRA, Rank
from lorakit.methods.method import AdapterParts, Method, Update, copy_strictly
from lorakit.methods.patterns import at_sites
from lorakit.methods.rule import Rule

RESERVE = 1e-3
"""Factor on both factors of a component in reserve: it acts with a millionth of its size, and only while training."""


class Block(nn.Module):
    """Some components: ``A[k, d_in]``, ``E[k]``, ``B[d_out, k]``; without ``E`` they are in reserve."""

    def __init__(self, A: Tensor, E: Tensor | None, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.E = None if E is None else nn.Parameter(E)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return what acts: ``diag(E) A`` and ``B``."""
        if self.E is None:
            return RESERVE * self.A, RESERVE * self.B
        return self.E[..., :, None] * self.A, self.B


class ComponentsUpdate(Update):
    """Components in blocks that are concatenated, and some in reserve that act, next to nothing, while training.

    Attributes:
        blocks: the components that count.
        reserve: those that learn in advance; they are neither saved nor used outside training.
        bias: the adapter's own bias, where it is trained.
        seed: of components that are drawn later.
        stack, d_in, d_out: sizes of the weight.
        scale: the constant factor.
    """

    place: Tensor

    def __init__(
        self, site: Site, scale: float, dropout: float, seed: int, bias: Tensor | None, A: Tensor, E: Tensor, B: Tensor
    ) -> None:
        super().__init__()
        self.seed = seed
        self.bias = None if bias is None else nn.Parameter(bias)
        self.stack, self.d_in, self.d_out = site.stack, site.d_in, site.d_out
        self.scale, self.dropout = scale, dropout
        self.blocks = nn.ModuleList([Block(A, E, B)])
        self.reserve = nn.ModuleList()
        # Says device and dtype where no component is left.
        self.register_buffer("place", torch.empty(0, device=A.device, dtype=A.dtype), persistent=False)

    @property
    def rank(self) -> int:
        """How many components count."""
        return sum(block.A.shape[-2] for block in self.counting())

    @property
    def room(self) -> int:
        """The most components that the weight can have: its smaller side."""
        return min(self.d_in, self.d_out)

    def counting(self) -> Iterator[Block]:
        """Yield the blocks that count."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def reserved(self) -> Iterator[Block]:
        """Yield the blocks in reserve."""
        for block in self.reserve:
            assert isinstance(block, Block)
            yield block

    def pair(self, reserved: bool = False) -> tuple[Tensor, Tensor] | None:
        """Return ``diag(E) A`` and ``B``, with what is in reserve or without it; None where there is nothing."""
        pairs = [block.pair() for block in (*self.counting(), *(self.reserved() if reserved else ()))]
        if len(pairs) <= 1:
            return pairs[0] if pairs else None
        return torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return ``scale * B diag(E) A``, or nothing where every component is gone, and the shift of the bias."""
        base, shift = ops.bias(layer), None
        if self.bias is not None and base is not None:
            shift = self.bias - base.detach().to(self.bias.dtype)
        pair = self.pair(self.training)
        A, B = (None, None) if pair is None else pair
        return Terms(A, B, self.scale, dropout=self.dropout, bias_shift=shift)

    def tensors(self) -> dict[str, Tensor]:
        """Return the plain pair ``A = diag(E) A``, ``B``, unless every component is gone, and what else is trained."""
        pair = self.pair()
        found = {} if pair is None else dict(zip("AB", pair, strict=True))
        return found if self.bias is None else {**found, "bias": self.bias}

    def load(self, given: Mapping[str, Tensor]) -> list[str]:
        """Take a saved pair of any rank: its components with ``E = 1``; all others, also in reserve, are gone."""
        own = {} if self.bias is None else {"bias": self.bias}
        problems = copy_strictly(own, {key: tensor for key, tensor in given.items() if key not in ("A", "B")})
        given = {key: tensor for key, tensor in given.items() if key in ("A", "B")}
        if len(given) == 1:
            problems.append(f"the adapter has no tensor '{'A' if 'B' in given else 'B'}'")
        elif given:
            k = given["A"].shape[-2] if given["A"].dim() > 1 else 0
            sizes = {"A": (*self.stack, k, self.d_in), "B": (*self.stack, self.d_out, k)}
            problems += [
                f"tensor '{key}' is {tuple(given[key].shape)} in the adapter, {size} here"
                for key, size in sizes.items()
                if tuple(given[key].shape) != size
            ]
        if not problems:
            self.take([(given["A"], torch.ones(*self.stack, given["A"].shape[-2]), given["B"])] if given else [])
        return problems

    @torch.no_grad()
    def take(
        self,
        blocks: Sequence[tuple[Tensor, Tensor, Tensor]],
        reserve: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Put components ``(A, E, B)``, and those in reserve ``(A, B)``, in the place of all that there are."""
        self.blocks = nn.ModuleList([Block(*(self._here(tensor) for tensor in block)) for block in blocks])
        self.reserve = nn.ModuleList([Block(self._here(A), None, self._here(B)) for A, B in reserve])

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.place, copy=True)

    def extra_repr(self) -> str:
        """Show rank and scale."""
        return f"rank={self.rank}, reserve={len(self.reserve)}, scale={self.scale:g}, dropout={self.dropout:g}"


class ComponentsMethod(Method):
    """What methods with components have in common.

    Attributes:
        rank: components per layer in the mean, when the run is over.
        alpha: strength, as in LoRA: the factor is ``alpha / rank`` (``alpha / sqrt(rank)`` with 'rslora'), the same for
            every layer and in every step, whatever components it has.
        dropout: probability with which A's input is dropped while training.
        scaling: 'standard' or 'rslora'.
        bias: which biases get a trained copy: 'none', 'lora_only' (the targets'), 'all' (every layer's).
        total: components of all layers together, when the run is over; None for ``rank`` times their number.
        budget: numbers of all layers' components together, in the place of ``total``: when the run is over there are
            not more, and fewer than another component would add. ``rank`` then is what the factor is of.
    """

    rank: Rank = 8
    alpha: Alpha = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    bias: Literal["none", "lora_only", "all"] = "none"
    total: Annotated[int, Field(ge=1, strict=True)] | None = None
    budget: Annotated[int, Field(ge=1, strict=True)] | None = None

    @property
    def scale(self) -> float:
        """The constant factor, that of a LoRA with this ``rank``."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    @abstractmethod
    def start_rank(self) -> int:
        """How many components a layer starts with, if it has room for them."""

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse a rank above a layer's smaller side, a total out of reach, and dropout that a layer does not take."""
        super().check(sites)
        if self.total is not None and self.budget is not None:
            raise ConfigError(
                f"total={self.total:,} says how many components there are to be, budget={self.budget:,} how many "
                "numbers: give one of them."
            )
        least, most = self.reach(sites)
        wanted = self.wanted(len(sites))
        if not least <= wanted <= most:
            unit = "components" if self.budget is None else "numbers"
            field = "total" if self.budget is None else "budget"
            raise ConfigError(
                f"{wanted:,} {unit} are asked for in the end, but method '{self.name}' can come to {least:,} to "
                f"{most:,} on these {len(sites)} layers. Change {field}, rank or init_rank."
            )
        deaf = [site.path for site in sites if self.dropout > 0 and not site.ops.takes_dropout]
        if deaf:
            raise ConfigError(
                f"dropout={self.dropout:g} cannot act on {quoted(deaf)}: these layers multiply by their weights "
                "themselves, so that an update has no input of its own. Use dropout=0, or exclude them."
            )
        problems = [
            f"rank {self.rank} is above the smaller side of '{site.path}' ({site.d_out} x {site.d_in})"
            for site in sites
            if self.rank > min(site.d_out, site.d_in)
        ]
        if problems:
            raise ShapeError(f"{bullet_list(problems)}. Lower the rank, or exclude these layers.")

    @abstractmethod
    def reach(self, sites: Sequence[Site]) -> tuple[int, int]:
        """Return the least and the most components (numbers, where there is a budget) that the end can have."""

    def wanted(self, num_layers: int) -> int:
        """Return how many components (numbers, where there is a budget) all layers together are to end with."""
        if self.budget is not None:
            return self.budget
        return self.total if self.total is not None else self.rank * num_layers

    def price(self, of: Site | ComponentsUpdate) -> int:
        """Return what a component of a layer counts for: 1, or its numbers where there is a budget."""
        return 1 if self.budget is None else math.prod(of.stack) * (of.d_out + of.d_in + 1)

    def start_at(self, site: Site) -> int:
        """Return how many components the layer starts with: never more than its smaller side."""
        return min(self.start_rank, site.d_out, site.d_in)

    def build(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        dtype: torch.dtype,
        seen: Mapping[str, Any] = MappingProxyType({}),
    ) -> AdapterParts:
        """Make components with random orthonormal directions and ``E = 0``, see :class:`Method`."""
        updates: dict[str, Update] = {}
        for site in sites:
            rank, device = self.start_at(site), site.ops.weight(site.layer).device
            A = orthonormal(torch.empty(*site.stack, 0, site.d_in), rank, generator)
            B = orthonormal(torch.empty(*site.stack, 0, site.d_out), rank, generator).mT
            tensors = (tensor.contiguous().to(device, dtype) for tensor in (A, torch.zeros(*site.stack, rank), B))
            seed = int(torch.randint(2**62, (1,), generator=generator))
            bias = site.ops.bias(site.layer) if self.bias != "none" else None
            own = None if bias is None else bias.detach().to(dtype, copy=True)
            updates[site.path] = ComponentsUpdate(site, self.scale, self.dropout, seed, own, *tensors)
        return AdapterParts(updates)

    def trained_biases(self) -> str:
        """Return the field ``bias``."""
        return self.bias

    def uncalibrated(self, sites: Sequence[Site]) -> Method:
        """Return a LoRA from zeros with as many components as there are in the mean when there are most."""
        most = max(self.start_rank, self.rank)
        blank = LoRA(rank=most, alpha=self.alpha, dropout=self.dropout, bias=self.bias, init=Blank())
        return at_sites(blank, {site.path: (min(most, site.d_out, site.d_in), self.scale) for site in sites})

    def finished(self, updates: Mapping[str, Update]) -> Method:
        """Return plain LoRA with the ranks that there are, and this method's constant factor at each."""
        own = {path: update for path, update in updates.items() if isinstance(update, ComponentsUpdate)}
        # A bias of a layer without components is none of the targets'.
        apart = self.bias == "lora_only" and any(u.rank == 0 and u.bias is not None for u in own.values())
        plain = LoRA(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            scaling=self.scaling,
            bias="all" if apart else self.bias,
        )
        return at_sites(plain, {path: (update.rank, update.scale) for path, update in own.items() if update.rank > 0})


class ComponentsRule(Rule):
    """What rules over components have in common: which layers, how many components, and orthogonality.

    Attributes:
        layers: the updates with components by path.
        prices: what a component of each counts for, by path: 1, or its numbers where there is a budget.
        start, target: how much all layers start with and may end with, in that unit.
        first, last: the steps of the first and the last choice.
        every: steps between two choices.
        orthogonality: weight of the penalty, gamma.
    """

    def __init__(
        self, updates: Mapping[str, Update], num_steps: int, method: ComponentsMethod, orthogonality: float
    ) -> None:
        super().__init__(updates, num_steps)
        self.layers = {path: update for path, update in updates.items() if isinstance(update, ComponentsUpdate)}
        self.prices = {path: method.price(update) for path, update in self.layers.items()}
        self.start = sum(
            self.prices[path] * min(method.start_rank, update.room) for path, update in self.layers.items()
        )
        self.target = method.wanted(len(self.layers))
        self.orthogonality = orthogonality
        self.first, self.last, self.every = num_steps, num_steps, 1
        self._remarks: list[str] = []

    def plan(self, tinit: float, tfinal: float, interval: int) -> None:
        """Set the steps of the choices: after ``tinit`` and before the last ``tfinal`` steps (or shares of them).

        Where these are more steps than the run has, each gets its part of those, and the user is told.
        """
        before, after = steps_of(tinit, self.num_steps), steps_of(tfinal, self.num_steps)
        if before + after > self.num_steps:
            part = self.num_steps / (before + after)
            before, after = part * before, part * after
            self._remarks.append(
                f"The run has {self.num_steps:,} steps, fewer than tinit={tinit:g} and tfinal={tfinal:g} together: the "
                f"ranks are chosen between step {max(1, round(before)):,} and the last {int(after):,}."
            )
        self.first = max(1, round(before))
        self.last = max(self.first, self.num_steps - int(after))
        # A tenth of the time at most, so that a short run does not choose all at once.
        self.every = max(1, min(interval, (self.last - self.first) // 10))

    def chooses(self, step: int) -> bool:
        """Tell whether components are chosen after the ``step``-th step."""
        return step == self.last or (self.first <= step < self.last and (step - self.first) % self.every == 0)

    def remarks(self) -> list[str]:
        """Return what has become of the components."""
        told, self._remarks = self._remarks, []
        return told

    def count(self) -> int:
        """Return how many components count now."""
        return sum(update.rank for update in self.layers.values())

    def spent(self) -> int:
        """Return what those count for that there are now."""
        return sum(self.prices[path] * update.rank for path, update in self.layers.items())

    def ranks(self) -> str:
        """Say the ranks there are, in words."""
        found = [update.rank for update in self.layers.values()]
        none = found.count(0)
        spread = f"ranks {min(found)} to {max(found)}" if len(found) > 1 else f"rank {found[0]}"
        return spread + (f", {none} of {len(found)} layers without any" if none else "")

    @torch.no_grad()
    def add_orthogonality(self) -> None:
        """Add to the gradients that of ``gamma * sum (||A A^T - I||_F^2 + ||B^T B - I||_F^2)`` over all layers.

        All components of a layer count as one matrix.
        """
        for update in self.layers.values():
            blocks = list(update.counting())
            if not blocks or self.orthogonality == 0.0:
                continue
            rows = torch.cat([block.A for block in blocks], dim=-2)
            columns = torch.cat([block.B for block in blocks], dim=-1)
            of_A, of_B = orthogonality_gradient(rows), orthogonality_gradient(columns.mT).mT
            start = 0
            for block in blocks:
                count = block.A.shape[-2]
                for parameter, whole, dim in ((block.A, of_A, -2), (block.B, of_B, -1)):
                    if parameter.grad is not None:
                        parameter.grad.add_(whole.narrow(dim, start, count), alpha=self.orthogonality)
                start += count


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """Return the gradient of ``||R R^T - I||_F^2``, which is ``4 (R R^T - I) R``, for ``rows[..., k, n]``."""
    k = rows.shape[-2]
    return 4.0 * ((rows @ rows.mT - torch.eye(k, device=rows.device, dtype=rows.dtype)) @ rows)


def orthonormal(beside: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` random unit rows, orthogonal to each other and to ``beside[..., k, n]``; in fp32 on the CPU."""
    *stack, k, n = beside.shape
    drawn = torch.randn(*stack, n, count, generator=generator)
    Q, _ = torch.linalg.qr(torch.cat([beside.detach().float().cpu().mT, drawn], dim=-1))
    new: Tensor = Q[..., :, k:].mT
    return new.contiguous()


def steps_of(value: float, num_steps: int) -> float:
    """Return a number of steps that may be given as a share of all, below 1."""
    return value * num_steps if value < 1 else value
