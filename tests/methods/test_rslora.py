"""rsLoRA: an alias of LoRA with another factor, and what that factor does to gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import lorakit as lk
from lorakit.cli.methods import methods
from lorakit.errors import ConfigError
from lorakit.methods import find_method
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.method import aliases_of
from lorakit.training.config import TrainConfig

WIDTH, OUT, ALPHA = 64, 80, 24.0
# Slopes of log gradient norm in log rank: exactly 0 and -1/2 at B = 0 for an A with orthogonal rows; a random A of
# 4 to 64 rows and ten steps of training leave less than a tenth.
FLAT, FALLING = 0.1, -0.4


def slope(method: str, optimizer: type[torch.optim.Optimizer]) -> float:
    """Return the slope of log gradient norm in log rank over ranks 4, 16, 64, after ten steps."""
    logs = []
    for rank in (4, 16, 64):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=False))
        x, goal = torch.randn(48, WIDTH), torch.randn(48, OUT)
        handle = lk.attach(model, {"name": method, "rank": rank, "alpha": ALPHA}, "0")
        parameters = list(handle.parameters().values())
        steps = optimizer(parameters, lr=1e-4)  # type: ignore[call-arg]
        for _ in range(10):
            steps.step()
            steps.zero_grad()
            (model(x) - goal).square().mean().backward()
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        logs.append((math.log(rank), math.log(float(norm))))
    return (logs[-1][1] - logs[0][1]) / (logs[-1][0] - logs[0][0])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_its_gradient_keeps_its_size_at_any_rank(optimizer: type[torch.optim.Optimizer]) -> None:
    assert abs(slope("rslora", optimizer)) <= FLAT


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_plain_loras_gradient_shrinks_with_the_rank(optimizer: type[torch.optim.Optimizer]) -> None:
    assert slope("lora", optimizer) <= FALLING


def test_it_is_lora_with_another_scaling() -> None:
    assert find_method("rslora", rank=4) == LoRA(rank=4, scaling="rslora")


@pytest.mark.parametrize("name", ["rsLoRA", "LoRA+", "LoRA-FA", "LoRA-Pro", "LoRAPlus"])
def test_a_method_is_found_by_name_and_alias_in_any_case(name: str) -> None:
    assert find_method(name) == find_method(name.lower())


def test_a_field_against_the_alias_is_refused() -> None:
    with pytest.raises(ConfigError, match="'rslora' means scaling='rslora', not 'standard'"):
        find_method("rslora", scaling="standard")


def test_a_field_that_the_alias_means_may_be_given() -> None:
    assert find_method({"name": "rslora", "scaling": "rslora"}) == LoRA(scaling="rslora")


def test_a_derived_method_does_not_have_the_alias() -> None:
    assert dict(aliases_of(DoRA)) == {}


def test_a_saved_summary_says_the_method_itself() -> None:
    summary = find_method("rslora").summary()
    assert (summary["name"], summary["scaling"]) == ("lora", "rslora")


def test_the_settings_of_a_run_take_the_alias() -> None:
    assert TrainConfig(method="rslora", rank=4).resolved_method() == LoRA(rank=4, scaling="rslora")


def test_a_wrong_name_is_told_the_alias() -> None:
    with pytest.raises(ConfigError, match=r"no method 'rs-lora'\. Closest: 'rslora'"):
        TrainConfig(method="rs-lora")


def test_the_command_shows_the_alias_and_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    methods(as_json=False)
    assert "also called: rslora (with scaling=rslora)" in capsys.readouterr().out


def test_peft_reads_the_same_logits(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))

    model, x = base().eval(), torch.randn(5, 6)
    handle = lk.attach(model, find_method("rslora", rank=3, alpha=5), ["0", "2"])
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    lk.save(handle, tmp_path)
    theirs = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)  # fp32 sums over ten terms
