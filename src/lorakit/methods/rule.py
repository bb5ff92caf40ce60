"""``Rule``: what a method does while one adapter trains, beside the gradient steps themselves.

A method is a frozen value; what it remembers from step to step (scores, budgets, components in reserve) is
its rule's, one for each adapter and run. The plain rule does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lorakit.methods.method import Update

Group = dict[str, Any]


class Rule:
    """The plain rule, and the contract of others.

    Attributes:
        updates: the adapter's updates by path; a rule may change what parameters they have.
        num_steps: how many optimizer steps the run will take.
    """

    def __init__(self, updates: Mapping[str, Update], num_steps: int) -> None:
        self.updates, self.num_steps = updates, num_steps

    def groups(self, named: Mapping[str, nn.Parameter], lr: float) -> list[Group]:
        """Split the adapter's parameters into optimizer groups; by default one, at ``lr``.

        A group that came to be in the middle of a run may say so: ``born``, the number of steps taken before it,
        and ``warmup``, over how many steps its rate rises to what the schedule says. Asked again whenever
        the adapter's parameters have changed; what the optimizer remembers of those that stayed is kept.

        Args:
            named: every parameter by name, those of updates as ``path.tensor``; also of modules trained in full.
            lr: the peak learning rate.
        """
        return [{"params": list(named.values()), "lr": lr}]

    def penalty(self) -> Tensor | None:
        """Return a term to add to a step's loss, or None."""
        return None

    def before_step(self, step: int) -> None:
        """Act on the gradients of the ``step``-th step (from 1), which are not clipped yet."""

    def after_step(self, step: int) -> None:
        """Act on the updates after the ``step``-th step of the optimizer; their gradients are still there."""

    def carry(self, remembered: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Return what the optimizer is to remember of parameters that took the place of others; asked once for each.

        Args:
            remembered: what it remembered, by parameter, of those before.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what training must remember beside the saved adapter, by name, for a checkpoint."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` returned; the updates hold the saved adapter by then."""

    def settled(self) -> bool:
        """Tell whether what acts is of the size that the run is to end with; until then no evaluation is the best."""
        return True

    def remarks(self) -> list[str]:
        """Return what a user should be told since the last call, a sentence each."""
        return []
