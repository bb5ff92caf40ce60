"""LoRA+: the groups of its optimizer, and what they leave as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.methods.lora import LoRA
from lorakit.methods.loraplus import LoRAPlus
from lorakit.training.optimizers import OPTIMIZERS, optimizer_for

RATIO, LR = 16.0, 3e-4
# AdamW's first step is lr g / (|g| + eps) with eps 1e-8: gradients of 1e-3 and more leave five digits.
FIRST_STEP = 1e-4


class Net(nn.Module):
    """Tokens to scores: an embedding, a layer, a norm and a head, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.up(self.embed(tokens)))))


def attached(method: LoRA) -> lk.Handle:
    torch.manual_seed(2)
    return lk.attach(Net(), method, ["embed", "up"], train_modules=["norm", "head"], seed=5)


def train(handle: lk.Handle, num_steps: int, lr: float, kind: str = "adamw") -> None:
    tokens = torch.randint(0, 17, (8, 6), generator=torch.Generator().manual_seed(1))
    goal = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(2))
    rule = handle.entry("default").method.rule(handle.updates(), num_steps)
    optimizer = optimizer_for(rule, handle.parameters(), kind, lr, 0.1)
    for step in range(1, num_steps + 1):
        optimizer.zero_grad()
        (handle.model(tokens) - goal).square().mean().backward()
        rule.before_step(step)
        optimizer.step()


def rates(method: LoRA) -> dict[str, float]:
    """Return the rate of every parameter."""
    handle = attached(method)
    named = handle.parameters()
    groups = method.rule(handle.updates(), 10).groups(named, LR)
    by_id = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in named.items()}


def test_only_the_factors_that_start_at_zero_have_the_larger_rate() -> None:
    found = rates(LoRAPlus(rank=3, alpha=5, ratio=RATIO, bias="lora_only"))
    faster = {"embed.A": RATIO * LR, "up.B": RATIO * LR}
    others = ["embed.B", "up.A", "up.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert found == {**faster, **dict.fromkeys(others, LR)}


def test_the_group_at_the_base_rate_comes_first() -> None:
    method = LoRAPlus(rank=3)
    handle = attached(method)
    assert method.rule(handle.updates(), 10).groups(handle.parameters(), LR)[0]["lr"] == LR


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_with_the_ratio_1_it_is_lora_bit_for_bit(kind: str) -> None:
    plain, plus = attached(LoRA(rank=3, alpha=5)), attached(LoRAPlus(rank=3, alpha=5, ratio=1))
    for handle in (plain, plus):
        train(handle, 6, 1e-2, kind)
    assert all(torch.equal(p, plus.parameters()[name]) for name, p in plain.parameters().items())


@pytest.mark.parametrize("name", ["embed.A", "up.B"])
def test_the_first_step_is_ratio_times_as_far(name: str) -> None:
    plain, plus = attached(LoRA(rank=3, alpha=5)), attached(LoRAPlus(rank=3, alpha=5, ratio=RATIO))
    for handle in (plain, plus):
        train(handle, 1, 1e-3)
    moved = plus.parameters()[name].detach().norm() / plain.parameters()[name].detach().norm()
    assert float(moved) == pytest.approx(RATIO, rel=FIRST_STEP)


def test_a_ratio_below_1_is_refused() -> None:
    with pytest.raises(ConfigError, match="ratio"):
        LoRAPlus(ratio=0.5)


def test_a_loaded_adapter_trains_on_with_its_rates(tmp_path: Path) -> None:
    method = LoRAPlus(rank=3, alpha=5, ratio=4)
    torch.manual_seed(2)
    lk.save(lk.attach(Net(), method, ["embed", "up"]), tmp_path)
    torch.manual_seed(2)
    again = lk.load(Net(), tmp_path, trainable=True)
    found = again.entry("default").method
    groups = found.rule(again.updates(), 10).groups(again.parameters(), LR)
    assert found == method
    assert sorted(tuple(p.shape) for p in groups[1]["params"]) == [(3, 17), (20, 3)]


def test_peft_reads_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(2)
    handle, tokens = lk.attach(Net(), LoRAPlus(rank=3, alpha=5), ["embed", "up"]), torch.randint(0, 17, (2, 6))
    train(handle, 3, 1e-2)
    lk.save(handle, tmp_path)
    torch.manual_seed(2)
    theirs = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(tokens), handle.model(tokens), rtol=0, atol=1e-5)  # fp32 sums over 20 terms
