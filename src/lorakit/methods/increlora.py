"""IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning.

Zhang, Li, Chen, Jiang, Wang, Qian; 2023, arXiv 2308.12043.

    W' = W0 + scale * sum_i E_i b_i a_i        every layer starts with ``init_rank`` components, E = 0

Every so often some layers get another component, until all together have as many as they may: the budget is met
exactly. The next component of each layer is in reserve before it is needed: it acts with a millionth of its size, and
only while training, so that a and b find their directions first (advance learning). When its turn comes it begins with
``E = 0`` and a learning rate of its own that rises from 0 (restart warm-up).

    S_k = -d L / d e_k     e_k the strength of the reserve of layer k, at unit size, smoothed over the steps

Differences from the paper and its code:

- A layer's score is how fast its reserve would lower the loss, which the reserve's gradients say. The paper takes the
  mean of ``|D * dL/dD|`` over the update ``D`` that the layer already has, for which every layer's dense ``D`` must be
  formed and held (the code divides by the root of its size, which favours large layers); it does not see what a layer
  lacks.
- The factor is LoRA's at the rank in the end, ``alpha / rank``, and constant. The code divides by the rank of the
  moment, so that growth shrinks what was learned. Here no growth changes what the layer computes.
- All components of a layer are one matrix to the orthogonality penalty; the code only keeps each one's length. Those in
  reserve are drawn, and kept by projection, orthogonal to all others of their layer and of unit length: they can learn
  only what the layer lacks.
- The gradients of what is in reserve are raised to those of components that act, but never above all of theirs
  together: the optimizer's epsilon would swallow them, and clipping must not see them alone.
- How many components a choice adds follows from the steps that are left. When the budget is met, the reserves go.
- What is saved is a plain LoRA, ``diag(E) A`` and ``B``, with a rank for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.layers import Site
from lorakit.methods.components import RESERVE, Block, ComponentsMethod, ComponentsRule, ComponentsUpdate, orthonormal
from lorakit.methods.method import Update
from lorakit.methods.rule import Group, Rule

Steps = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_TINY = 1e-30


class IncreLoRA(ComponentsMethod):
    """LoRA whose ranks the training chooses: it starts with one component per layer and adds where most is missing.

    Attributes:
        rank: components per layer in the end, in the mean.
        init_rank: components per layer at the start.
        alpha, dropout, scaling, bias: as in LoRA.
        total: components of all layers together in the end; None for ``rank`` times their number.
        budget: numbers of all layers together in the end, in the place of ``total``, as near below as components go.
        tinit, tfinal: steps before the first choice and after the last; below 1 a share of all steps.
        interval: steps between two choices, at most a tenth of the time there is for them; so long the learning rate
            of new components rises.
        orthogonality: weight of the penalty that keeps components apart.
        beta: how slowly the scores follow.
    """

    name: ClassVar[str] = "increlora"

    init_rank: Annotated[int, Field(ge=1, strict=True)] = 1
    tinit: Steps = 0.1
    tfinal: Steps = 0.4
    interval: Annotated[int, Field(ge=1, strict=True)] = 10
    orthogonality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.95

    @property
    def start_rank(self) -> int:
        """``init_rank``."""
        return self.init_rank

    def reach(self, sites: Sequence[Site]) -> tuple[int, int]:
        """Return what the end can have: from the start's components to all that there is room for."""
        least = sum(self.price(site) * self.start_at(site) for site in sites)
        return least, sum(self.price(site) * min(site.d_out, site.d_in) for site in sites)

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        """Return the rule that lets layers grow."""
        return IncreLoRARule(updates, num_steps, self)


class IncreLoRARule(ComponentsRule):
    """Keeps reserves, scores them, and lets the best of all layers count.

    Attributes:
        grown: steps after which components came, with their number.
    """

    def __init__(self, updates: Mapping[str, Update], num_steps: int, method: IncreLoRA) -> None:
        super().__init__(updates, num_steps, method, method.orthogonality)
        self.plan(method.tinit, method.tfinal, method.interval)
        self.beta = method.beta
        self.grown: list[tuple[int, int]] = []
        missing = self.target - self.start
        self.events = self._events(missing // max(1, min(self.prices.values(), default=1)))
        self.each = max(1, math.ceil(missing / len(self.events) / max(1, sum(self.prices.values()))))
        self._generator = torch.Generator().manual_seed(next((u.seed for u in self.layers.values()), 0))
        self._born: dict[nn.Parameter, int] = {}
        self._gain: dict[Block, Tensor] = {}
        if self.grows():
            self._refill(0)

    def grows(self) -> bool:
        """Whether components are still to come: some layer has room for one, and the budget pays for it."""
        left = self.target - self.spent()
        return any(self.prices[path] <= left and update.rank < update.room for path, update in self.layers.items())

    def settled(self) -> bool:
        """Tell whether all components have come."""
        return not self.grows()

    def _events(self, missing: int) -> list[int]:
        """Return the steps of the choices: as many as the interval allows, or as there are components to come."""
        span = self.last - self.first
        count = max(1, min(missing, span // self.every + 1))
        self.every = max(1, span // max(1, count - 1))
        return sorted({self.last - (count - 1 - i) * span // max(1, count - 1) for i in range(count)})

    def groups(self, named: Mapping[str, nn.Parameter], lr: float) -> list[Group]:
        """Return a group for what was there at the start, and one with its warm-up for each choice's new parameters."""
        by_birth: dict[int, list[nn.Parameter]] = {0: []}
        for parameter in named.values():
            by_birth.setdefault(self._born.get(parameter, 0), []).append(parameter)
        groups: list[Group] = [{"params": by_birth.pop(0), "lr": lr}]
        return groups + [
            {"params": by_birth[born], "lr": lr, "born": born, "warmup": self.every} for born in sorted(by_birth)
        ]

    def scores(self) -> dict[Block, float]:
        """Return how fast each component in reserve would lower the loss."""
        found = {block: self._gain[block] for _, block in self._reserves() if block in self._gain}
        if not found:
            return {}
        values = torch.stack([gain.double().cpu() for gain in found.values()]).tolist()
        return dict(zip(found, values, strict=True))

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Score the reserves by the step's gradients, raise these, and add the penalty's."""
        if self.grows():
            self._take_in()
            self._raise()
        self.add_orthogonality()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Let the best reserves count where a choice is due, and put new ones in their place."""
        if not self.grows():
            return
        self._straighten()
        if step not in self.events:
            return
        left = [event for event in self.events if event >= step]
        added = self._grow(step, math.ceil((self.target - self.spent()) / len(left)))
        while step == self.last and self.grows():  # more than the reserves held
            self._refill(step)
            added += self._grow(step, self.target - self.spent())
        self.grown.append((step, added))
        if self.grows():
            self._refill(step)
            return
        self._gain.clear()
        for update in self.layers.values():
            update.reserve = nn.ModuleList()
        grown = f"{self.count() - sum(count for _, count in self.grown):,} components have grown to {self.count():,}"
        self._remarks.append(f"IncreLoRA: {grown} in {len(self.grown):,} choices; {self.ranks()}.")

    def state(self) -> dict[str, Tensor]:
        """Return components, their births and scores, and the generator."""
        found = {"generator": self._generator.get_state(), "grown": torch.tensor(self.grown).reshape(-1, 2)}
        for path, update in self.layers.items():
            for kind, blocks in (("blocks", update.counting()), ("reserve", update.reserved())):
                for i, block in enumerate(blocks):
                    for part, parameter in block.named_parameters():
                        found[f"{path}/{kind}/{i}/{part}"] = parameter.detach()
                        found[f"{path}/{kind}/{i}/{part}/born"] = torch.tensor(self._born.get(parameter, 0))
                    if block in self._gain:
                        found[f"{path}/{kind}/{i}/gain"] = self._gain[block]
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take components, births, scores and generator as they were."""
        self._generator.set_state(tensors["generator"])
        self.grown = [(step, count) for step, count in tensors["grown"].tolist()]
        self._born.clear()
        self._gain.clear()
        for path, update in self.layers.items():
            counting = list(_numbered(tensors, f"{path}/blocks"))
            reserve = list(_numbered(tensors, f"{path}/reserve"))
            update.take(
                [tuple(tensors[f"{key}/{part}"] for part in "AEB") for key in counting],  # type: ignore[misc]
                [tuple(tensors[f"{key}/{part}"] for part in "AB") for key in reserve],  # type: ignore[misc]
            )
            blocks = [*update.counting(), *update.reserved()]
            for key, block in zip([*counting, *reserve], blocks, strict=True):
                for part, parameter in block.named_parameters():
                    self._be_born(parameter, int(tensors[f"{key}/{part}/born"]))
                if f"{key}/gain" in tensors:
                    self._gain[block] = tensors[f"{key}/gain"].to(block.A.device, copy=True)

    def _reserves(self) -> Iterator[tuple[ComponentsUpdate, Block]]:
        for update in self.layers.values():
            for block in update.reserved():
                yield update, block

    def _be_born(self, parameter: nn.Parameter, step: int) -> None:
        if step > 0:
            self._born[parameter] = step

    def _take_in(self) -> None:
        """Bring the scores up to date: ``<A, dL/dA>`` is the strength's gradient, times the reserve's factor."""
        for _, block in self._reserves():
            if block.A.grad is None:
                continue
            square = block.A.square().sum(dim=(-2, -1)) * block.B.square().sum(dim=(-2, -1))
            size = square.sum().sqrt().clamp_min(_TINY) * RESERVE**2
            gain = -(block.A * block.A.grad).sum() / size
            before = self._gain.get(block, torch.zeros_like(gain))
            # A step whose gradients are not finite, as fp16 has them, tells nothing.
            self._gain[block] = torch.where(gain.isfinite(), self.beta * before + (1.0 - self.beta) * gain, before)

    def _raise(self) -> None:
        """Raise the reserves' gradients to those of acting components, but not above all of theirs together."""
        reserve = [p.grad for _, block in self._reserves() for p in (block.A, block.B) if p.grad is not None]
        if not reserve:
            return
        acting = [
            p.grad
            for update in self.layers.values()
            for block in update.counting()
            for p in block.parameters()
            if p.grad is not None
        ]
        norms = [_norm(acting, reserve[0].device), _norm(reserve, reserve[0].device)]
        factor = (norms[0] / norms[1].clamp_min(_TINY)).clamp(1.0, RESERVE**-2)
        for gradient in reserve:
            gradient.mul_(factor.to(gradient.device))

    def _straighten(self) -> None:
        """Turn the reserves away from what their layer has, and give them unit length: what it lacks is theirs."""
        for update in self.layers.values():
            rows = torch.cat([block.A for block in update.counting()], dim=-2)
            columns = torch.cat([block.B for block in update.counting()], dim=-1).mT
            for block in update.reserved():
                a, b = block.A - block.A @ rows.mT @ rows, block.B.mT - block.B.mT @ columns.mT @ columns
                block.A.copy_(torch.nn.functional.normalize(a, dim=-1))
                block.B.copy_(torch.nn.functional.normalize(b, dim=-1).mT)
                rows, columns = torch.cat([rows, block.A], dim=-2), torch.cat([columns, block.B.mT], dim=-2)

    def _grow(self, step: int, share: int) -> int:
        """Let the best components in reserve count that a share of the budget pays for; return their number."""
        gains, added = self.scores(), 0
        reserves = [(path, update, block) for path, update in self.layers.items() for block in update.reserved()]
        for path, update, block in sorted(reserves, key=lambda found: -gains.get(found[2], 0.0)):
            if self.prices[path] > share:
                continue
            share, added = share - self.prices[path], added + 1
            block.E = nn.Parameter(torch.zeros(*update.stack, 1, device=block.A.device, dtype=block.A.dtype))
            self._be_born(block.E, step)
            self._gain.pop(block, None)
            update.blocks.append(block)
            update.reserve = nn.ModuleList([other for other in update.reserve if other is not block])
        return added

    def _refill(self, step: int) -> None:
        """Draw new components for the reserves, orthogonal to all that their layer has."""
        for update in self.layers.values():
            count = min(self.each, update.room - update.rank) - len(update.reserve)
            blocks = [*update.counting(), *update.reserved()]
            if count <= 0:
                continue
            rows = torch.cat([block.A for block in blocks], dim=-2)
            columns = torch.cat([block.B for block in blocks], dim=-1).mT
            A, B = (orthonormal(beside, count, self._generator).to(update.place) for beside in (rows, columns))
            for i in range(count):
                block = Block(A[..., i : i + 1, :].contiguous(), None, B[..., i : i + 1, :].mT.contiguous())
                for parameter in block.parameters():
                    self._be_born(parameter, step)
                update.reserve.append(block)


def _norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of tensors taken together."""
    if not tensors:
        return torch.zeros((), device=device)
    norms: Tensor = torch.stack([norm.to(device) for norm in torch._foreach_norm(list(tensors))])
    return norms.square().sum().sqrt()


def _numbered(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[str]:
    """Yield ``prefix/0``, ``prefix/1``, ... as far as they are there."""
    i = 0
    while f"{prefix}/{i}/A" in tensors:
        yield f"{prefix}/{i}"
        i += 1
