"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning.

Zhang, Chen, Bukharin, He, Cheng, Chen, Zhao; 2023, arXiv 2303.10512.

    W' = W0 + scale * B diag(E) A      A[rank, d_in], E[rank], B[d_out, rank], E = 0 at the start           (eq. 3)
    I = |p * dL/dp|,  I_bar <- b1 I_bar + (1 - b1) I,  U <- b2 U + (1 - b2) |I - I_bar|,  s = I_bar * U      (eq. 8-11)
    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)                                                         (eq. 7)
    b(t) = target + (start - target) (1 - (t - t_i) / (T - t_i - t_f))^3      between t_i and T - t_f       (eq. 12)

Every layer starts with more components than it may keep. Every so often the best ``b(t)`` of all layers together are
kept, and E of the others is set to 0 (they may still come back); at ``T - t_f`` the choice is final.

Differences from the paper and its code:

- The factor is LoRA's at the rank that is kept in the mean, ``alpha / rank``, and constant: the same alpha means the
  same strength. The code divides by the rank at the start.
- Exactly ``b`` components are kept, whatever scores are equal; equal ones are taken evenly from all layers.
- The scores are the loss's alone: the gradient of the orthogonality penalty (the paper's, ``gamma`` times the sum of
  ``||A A^T - I||_F^2 + ||B^T B - I||_F^2`` over the layers) is added to the gradients after them, in closed form, so
  that the loss that is told is the task's. The code scores both, and takes the mean of norms that are not squared.
- A and B start orthonormal, not gaussian, so that the penalty starts at 0 for every size.
- After the final choice the others are removed: no numbers, no memory, no products; a layer without any is left alone.
  The optimizer keeps what it remembers of the components that stay.
- What is saved is a plain LoRA, ``diag(E) A`` and ``B``, with a rank for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.layers import Site
from lorakit.methods.components import Block, ComponentsMethod, ComponentsRule, ComponentsUpdate
from lorakit.methods.method import Update
from lorakit.methods.rule import Rule

Decay = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PARTS = ("A", "E", "B")


class AdaLoRA(ComponentsMethod):
    """LoRA whose ranks the training chooses: it starts with too many components and keeps the best of all layers.

    Attributes:
        rank: components per layer that are kept, in the mean.
        init_rank: components per layer at the start; None for one and a half times ``rank``.
        alpha, dropout, scaling, bias: as in LoRA.
        total: components that all layers keep together; None for ``rank`` times their number.
        budget: numbers that they keep at most, in the place of ``total``: the best components, as many as it pays for.
        tinit, tfinal: steps before the first choice and after the last; below 1 a share of all steps.
        interval: steps between two choices, at most a tenth of the time there is for them.
        orthogonality: weight of the penalty that keeps components apart, the paper's gamma.
        beta1, beta2: how slowly the scores, and their spread, follow.
    """

    name: ClassVar[str] = "adalora"

    init_rank: Annotated[int, Field(ge=1, strict=True)] | None = None
    tinit: Steps = 0.1
    tfinal: Steps = 0.4
    interval: Annotated[int, Field(ge=1, strict=True)] = 10
    orthogonality: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    beta1: Decay = 0.85
    beta2: Decay = 0.85

    @property
    def start_rank(self) -> int:
        """``init_rank``, or one and a half times ``rank``."""
        return self.init_rank if self.init_rank is not None else math.ceil(1.5 * self.rank)

    def reach(self, sites: Sequence[Site]) -> tuple[int, int]:
        """Return what the end can have: one component, the smallest there is, up to all of the start."""
        prices = [self.price(site) for site in sites]
        return min(prices), sum(p * self.start_at(site) for p, site in zip(prices, sites, strict=True))

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        """Return the rule that scores and chooses."""
        return AdaLoRARule(updates, num_steps, self)


class AdaLoRARule(ComponentsRule):
    """Scores components, keeps a falling number of them, and removes the others for good.

    Attributes:
        final: whether the others are removed.
    """

    def __init__(self, updates: Mapping[str, Update], num_steps: int, method: AdaLoRA) -> None:
        super().__init__(updates, num_steps, method, method.orthogonality)
        self.plan(method.tinit, method.tfinal, method.interval)
        self.beta1, self.beta2 = method.beta1, method.beta2
        self.final = False
        self._smooth: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}
        self._kept: list[tuple[nn.Parameter, nn.Parameter, int, Tensor]] = []

    def budget(self, step: int) -> int:
        """Return how many components (or numbers) all layers together keep after the ``step``-th step."""
        if step >= self.last:
            return self.target
        left = 1.0 - max(0, step - self.first) / (self.last - self.first)
        return max(self.target, round(self.target + (self.start - self.target) * left**3))

    def scores(self) -> dict[str, Tensor]:
        """Return each layer's components' scores, ``[rank]`` each, by path."""
        found = {}
        for path, update in self.layers.items():
            if update.rank == 0:
                continue
            s = {part: self._smooth[f"{path}/{part}"] * self._spread[f"{path}/{part}"] for part in PARTS}
            each = s["E"] + s["A"].mean(dim=-1) + s["B"].mean(dim=-2)
            found[path] = each.flatten(0, -2).mean(dim=0) if each.dim() > 1 else each
        return found

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Take the step's gradients into the scores, then add the penalty's."""
        if not self.final:
            self._take_in()
        self.add_orthogonality()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep the best components where a choice is due; the optimizer's momentum cannot undo it."""
        if self.final or not self.chooses(step):
            return
        masks = chosen(self.scores(), self.prices, self.budget(step))
        for path, mask in masks.items():
            self._block(self.layers[path]).E.mul_(mask)  # type: ignore[union-attr]
        if step == self.last:
            self._remove(masks)

    def settled(self) -> bool:
        """Tell whether the components that were too many are gone."""
        return self.final

    def carry(self, remembered: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Return what the optimizer remembered of the components that stayed."""
        found: dict[Tensor, dict[str, Any]] = {}
        for old, new, dim, kept in self._kept:
            if old in remembered:
                found[new] = {name: _part(value, old, dim, kept) for name, value in remembered[old].items()}
        self._kept.clear()
        return found

    def state(self) -> dict[str, Tensor]:
        """Return components and scores as they are."""
        found = {"final": torch.tensor(self.final)}
        found |= {f"now/{name}": parameter.detach() for name, parameter in self._parameters().items()}
        found |= {f"smooth/{name}": tensor for name, tensor in self._smooth.items()}
        return found | {f"spread/{name}": tensor for name, tensor in self._spread.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take components and scores as they were."""
        self.final = bool(tensors["final"])
        for path, update in self.layers.items():
            given = [tensors[f"now/{path}/{part}"] for part in PARTS if f"now/{path}/{part}" in tensors]
            update.take([(given[0], given[1], given[2])] if given else [])
        for own, prefix in ((self._smooth, "smooth/"), (self._spread, "spread/")):
            own.clear()
            for name in self._parameters():
                if f"{prefix}{name}" in tensors:
                    own[name] = tensors[f"{prefix}{name}"].to(self._parameters()[name], copy=True)

    def _block(self, update: ComponentsUpdate) -> Block:
        return next(update.counting())

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all components by ``path/part``."""
        found = {}
        for path, update in self.layers.items():
            for block in update.counting():
                found.update({f"{path}/{part}": block.get_parameter(part) for part in PARTS})
        return found

    def _take_in(self) -> None:
        """Bring the scores up to date; a step whose gradients are not finite, as fp16 has them, tells nothing."""
        named = {name: p for name, p in self._parameters().items() if p.grad is not None}
        if not named:
            return
        for name, parameter in self._parameters().items():
            if name not in self._smooth:
                self._smooth[name], self._spread[name] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        gradients = [p.grad for p in named.values() if p.grad is not None]
        found = torch._foreach_mul(list(named.values()), gradients)
        if not bool(torch.stack([total.to(found[0].device) for total in torch._foreach_norm(found)]).sum().isfinite()):
            return
        torch._foreach_abs_(found)
        smooth, spread = [self._smooth[name] for name in named], [self._spread[name] for name in named]
        torch._foreach_lerp_(smooth, found, 1.0 - self.beta1)
        torch._foreach_sub_(found, smooth)
        torch._foreach_abs_(found)
        torch._foreach_lerp_(spread, found, 1.0 - self.beta2)

    def _remove(self, masks: Mapping[str, Tensor]) -> None:
        before = self.count()
        for path, mask in masks.items():
            update, kept = self.layers[path], mask.nonzero().flatten()
            old = self._block(update)
            assert old.E is not None
            parts = ((old.A, -2), (old.E, -1), (old.B, -1))
            A, E, B = (parameter.index_select(dim, kept) for parameter, dim in parts)
            update.take([(A, E, B)] if len(kept) else [])
            for new in update.counting():
                news = (new.get_parameter(part) for part in PARTS)
                self._kept += [(p, n, dim, kept) for (p, dim), n in zip(parts, news, strict=True)]
        self.final = True
        self._smooth.clear()
        self._spread.clear()
        self._remarks.append(f"AdaLoRA: {self.count():,} of {before:,} components kept; {self.ranks()}.")


def chosen(scores: Mapping[str, Tensor], prices: Mapping[str, int], budget: int) -> dict[str, Tensor]:
    """Return which components a budget keeps, the best of all layers first: masks of booleans by path.

    One that is dearer than what is left is passed over. Of equal scores those with a lower number in their layer are
    taken first, so that the layers get as many each.

    Args:
        scores: of each component, ``[rank]`` by path.
        prices: what a component of each layer counts for.
        budget: what those that are kept may count for together.
    """
    places = sorted((i, number) for number, each in enumerate(scores.values()) for i in range(len(each)))
    values = [each.double().cpu() for each in scores.values()]
    costs = [prices[path] for path in scores]
    flat = torch.stack([values[number][i] for i, number in places])
    masks = [torch.zeros(len(each), dtype=torch.bool) for each in values]
    for place in flat.argsort(descending=True, stable=True).tolist():
        i, number = places[place]
        if costs[number] <= budget:
            budget -= costs[number]
            masks[number][i] = True
    return {path: mask.to(scores[path].device) for path, mask in zip(scores, masks, strict=True)}


def _part(value: Any, old: Tensor, dim: int, kept: Tensor) -> Any:
    """Return the kept components' part of something that an optimizer remembers of a parameter."""
    if isinstance(value, Tensor) and value.dim() == old.dim() and value.shape[dim] == old.shape[dim]:
        return value.index_select(dim, kept.to(value.device)).contiguous()
    return value
