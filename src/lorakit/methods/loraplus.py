"""LoRA+: Efficient Low Rank Adaptation of Large Models.

Hayou, Ghosh, Yu; 2024, arXiv 2402.12354.

    A <- A - lr g_A,     B <- B - ratio lr g_B,     ratio >= 1       (g: what the optimizer makes of the gradient)

B starts at zero and A does not, so that with one rate for both B is the slower one, the more so the wider the layer is.
Nothing else is changed: with ``ratio=1`` it is LoRA, bit for bit.

Differences from the authors' code and PEFT's:

- An embedding's start is exchanged, ``A = 0``, so there A is the faster one. Theirs gives an embedding's factors a
  rate of their own, 1e-6, with which they hardly move.
- Biases, vectors and modules trained in full (a head, norms) stay at the base rate. Theirs sends every
  vector to the faster group, norms and DoRA's magnitude too, and a head's matrix to the slower one.
- The rate that is given is A's. As B's is ``ratio`` times as large, a good one is lower than LoRA's.

AdamW's decay is the rate times ``weight_decay``, so B decays ``ratio`` times as fast, as in theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from lorakit.layers import Site
from lorakit.methods.lora import LoRA, LowRankRule, LowRankUpdate
from lorakit.methods.method import Update
from lorakit.methods.rule import Group


class LoRAPlusUpdate(LowRankUpdate):
    """A low-rank pair that knows which factor is the faster one.

    Attributes:
        faster: the name of the factor that starts at zero: 'B', for an embedding 'A'.
    """

    faster = "B"


class LoRAPlusRule(LowRankRule):
    """Two groups: everything at ``lr``, and the faster factors at ``ratio * lr``."""

    def __init__(self, updates: Mapping[str, Update], num_steps: int, ratio: float) -> None:
        super().__init__(updates, num_steps)
        self.ratio = ratio

    def groups(self, named: Mapping[str, nn.Parameter], lr: float) -> list[Group]:
        """Split the adapter's parameters, see :class:`Rule`; the group at the base rate comes first."""
        fast_names = {
            f"{path}.{update.faster}" for path, update in self.updates.items() if isinstance(update, LoRAPlusUpdate)
        }
        slow = [parameter for name, parameter in named.items() if name not in fast_names]
        fast = [parameter for name, parameter in named.items() if name in fast_names]
        return [{"params": slow, "lr": lr}, {"params": fast, "lr": self.ratio * lr}]


class LoRAPlus(LoRA):
    """LoRA with a larger learning rate for B than for A. Fields as in LoRA, and one more.

    >>> LoRAPlus(rank=4, ratio=8).ratio
    8.0

    Attributes:
        ratio: how many times A's learning rate B has.
    """

    name: ClassVar[str] = "loraplus"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lora+": {}}

    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 16.0

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None) -> LoRAPlusUpdate:
        """Make the update of one site."""
        A, B, bias = self.start(site, generator, dtype, seen)
        update = LoRAPlusUpdate(A, B, self.scale_at(site.path), self.dropout, bias, self.init.shifts)
        update.faster = "A" if site.ops.input_is_index else "B"
        return update

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> LoRAPlusRule:
        """Return the rule with the two rates."""
        return LoRAPlusRule(updates, num_steps, self.ratio)
