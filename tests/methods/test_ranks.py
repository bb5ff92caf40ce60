"""rank='auto': a budget of numbers, met as closely as a component allows, spent where the layers need it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ConfigError, DataError, UnsupportedLayerError
from lorakit.layers import Site
from lorakit.methods.lora import LoRA, LowRankUpdate
from lorakit.methods.ranks import bought

SHAPES = ((24, 18), (12, 30), (28, 20))
COSTS = [a + b for a, b in SHAPES]
EVEN = sum(COSTS)
ALPHA = 7.0
SUM_ORDER = 1e-5  # fp32 sums of at most 30 terms of order 1 in another order


class Beside(nn.Module):
    """Layers of unlike shapes, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d_in, d_out, bias=False) for d_out, d_in in SHAPES])

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([d_in for _, d_in in SHAPES], dim=-1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], dim=-1)


def task(ranks: tuple[int, ...]) -> tuple[Beside, Tensor, Tensor]:
    """Return a model, inputs, and outputs of the same with weights changed by matrices of these ranks."""
    model = Beside()
    goal = copy.deepcopy(model)
    x = torch.randn(160, sum(d_in for _, d_in in SHAPES))
    with torch.no_grad():
        for layer, (d_out, d_in), rank in zip(goal.layers, SHAPES, ranks, strict=True):
            layer.weight.add_(torch.linalg.qr(torch.randn(d_out, rank)).Q @ torch.randn(rank, d_in) / d_in**0.5)
        return model, x, goal(x)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["goal"]).square().mean()


def calibration(x: Tensor, goal: Tensor) -> lk.Calibration:
    return lk.Calibration([{"x": a, "goal": b} for a, b in zip(x.split(20), goal.split(20), strict=True)], loss)


def attached(budget: int, ranks: tuple[int, ...] = (6, 2, 1), **fields: Any) -> Handle:
    model, x, goal = task(ranks)
    method = LoRA(rank="auto", budget=budget, alpha=ALPHA, **fields)
    return lk.attach(model, method, "all-linear", calibration=calibration(x, goal), seed=0)


def ranks_of(handle: Handle) -> dict[str, int]:
    found = {}
    for path, update in handle.updates().items():
        assert isinstance(update, LowRankUpdate)
        found[path] = int(update.A.shape[0])
    return found


def spent(handle: Handle) -> int:
    return sum(p.numel() for p in handle.parameters().values())


@pytest.mark.parametrize("rank_by", ["gradient", "inputs"])
@pytest.mark.parametrize("budget", [42, 100, 3 * EVEN, 3 * EVEN + 41, 1000])
def test_the_budget_is_never_exceeded_and_met_as_closely_as_a_component_allows(budget: int, rank_by: str) -> None:
    found = spent(attached(budget, rank_by=rank_by))
    assert budget - max(COSTS) < found <= budget


def test_more_goes_where_the_gradient_has_more_directions() -> None:
    ranks = ranks_of(attached(3 * EVEN))
    assert ranks["layers.0"] > ranks["layers.1"] > ranks.get("layers.2", 0)


def test_more_goes_where_fewer_components_explain_the_inputs() -> None:
    model, x, goal = task((1, 1, 1))
    x[:, :18] = torch.randn(160, 3) @ torch.randn(3, 18)  # rank 3; the others are isotropic
    method = LoRA(rank="auto", rank_by="inputs", budget=2 * EVEN, alpha=ALPHA)
    ranks = ranks_of(lk.attach(model, method, "all-linear", calibration=calibration(x, goal), seed=0))
    assert ranks["layers.0"] == 3
    assert ranks["layers.0"] > max(ranks.get("layers.1", 0), ranks.get("layers.2", 0))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("budget", [2 * EVEN, 2 * EVEN + 66])
def test_every_layer_has_the_factor_that_alpha_means_at_the_even_rank(budget: int, scaling: str) -> None:
    handle = attached(budget, scaling=scaling)
    even = budget / EVEN
    expected = ALPHA / (math.sqrt(even) if scaling == "rslora" else even)
    scales = [update.scale for update in handle.updates().values() if isinstance(update, LowRankUpdate)]
    assert scales == pytest.approx([expected] * len(scales))


def test_a_layers_own_alpha_is_heeded() -> None:
    handle = attached(2 * EVEN, alpha_pattern={"layers.0": 3.0})
    update = handle.updates()["layers.0"]
    assert isinstance(update, LowRankUpdate)
    assert update.scale == pytest.approx(1.5)


def test_the_method_that_is_attached_says_every_rank() -> None:
    handle = attached(100)
    method = handle.entry("default").method
    assert isinstance(method, LoRA)
    assert method.budget is None
    paths = [f"layers.{i}" for i in range(3)]
    assert {p: method.rank_at(p) for p in paths if method.rank_at(p)} == ranks_of(handle)


def test_a_saved_adapter_has_no_word_on_layers_that_were_left_alone() -> None:
    handle = attached(100)
    assert len(ranks_of(handle)) < len(SHAPES)
    method = handle.state().method
    assert isinstance(method, LoRA)
    method.check([Site.at(handle.model, path) for path in handle.updates()])  # refuses patterns that match nothing
    assert 0 not in method.rank_pattern.values()


@pytest.mark.parametrize("init", ["kaiming", "loraga", "loraone", "eva", "corda", "pissa"])
def test_peft_computes_the_same_from_chosen_ranks(init: str, tmp_path: Path) -> None:
    handle = attached(160, init=init)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, sum(d_in for _, d_in in SHAPES))
    expected = handle.model(x).detach()
    lk.save(handle, tmp_path)
    theirs = PeftModel.from_pretrained(handle.detach(), str(tmp_path))
    torch.testing.assert_close(theirs(x).detach(), expected, rtol=SUM_ORDER, atol=SUM_ORDER)


def test_what_is_saved_can_be_trained_on(tmp_path: Path) -> None:
    handle = attached(100)
    expected = ranks_of(handle)
    lk.save(handle, tmp_path)
    again = lk.load(handle.detach(), tmp_path, trainable=True)
    assert ranks_of(again) == expected


def test_a_budget_below_one_rank_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"budget 41 is below the 42 numbers of one rank at 'layers\.0'"):
        attached(41)


def test_a_budget_too_small_for_the_only_layer_that_the_loss_depends_on_is_refused() -> None:
    model, x, goal = task((6, 2, 1))
    wide = lk.Calibration([{"x": x, "goal": goal}], lambda model, batch: model.layers[2].weight.square().sum())
    with pytest.raises(DataError, match="the loss of batch 0 depends on none of the weights that are looked at"):
        lk.attach(model, LoRA(rank="auto", budget=45), "all-linear", calibration=wide)


def test_a_budget_above_all_there_is_is_refused() -> None:
    most = sum(cost * min(shape) for cost, shape in zip(COSTS, SHAPES, strict=True))
    with pytest.raises(ConfigError, match=f"budget {most + 1:,} is above the {most:,} numbers"):
        attached(most + 1)


def test_layers_whose_inputs_cannot_be_weighed_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    method = LoRA(rank="auto", rank_by="inputs", budget=100)
    with pytest.raises(UnsupportedLayerError, match="'0': the inputs of a convolution are maps"):
        lk.attach(model, method, "0", calibration=lk.Calibration([{"input": torch.randn(2, 4, 9)}]))


@pytest.mark.parametrize(
    ("worth", "costs", "budget", "expected"),
    [
        ({"a": [9, 8, 7], "b": [1, 1, 1]}, {"a": 1, "b": 1}, 4, {"a": 3, "b": 1}),
        ({"a": [9, 8, 7], "b": [1, 1, 1]}, {"a": 10, "b": 1}, 12, {"a": 0, "b": 3}),
        ({"a": [9, 8, 7], "b": [0.1, 0.1, 0.1]}, {"a": 10, "b": 3}, 17, {"a": 1, "b": 2}),
        ({"a": [0, 0, 0], "b": [0, 0, 0]}, {"a": 1, "b": 1}, 4, {"a": 2, "b": 2}),
    ],
    ids=["by worth", "by worth per number", "what still fits", "evenly where nothing is worth anything"],
)
def test_components_are_bought_by_worth_per_number(
    worth: dict[str, list[float]], costs: dict[str, int], budget: int, expected: dict[str, int]
) -> None:
    assert bought(worth, costs, dict.fromkeys(costs, 3), budget) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_chosen_ranks_learn_more_than_even_ones_where_layers_need_unlike_ranks(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, goal = task((8, 1, 1))

    def left(method: LoRA) -> float:
        handle = lk.attach(model, method, "all-linear", calibration=calibration(x, goal), seed=0)
        optimizer = torch.optim.AdamW(handle.parameters().values(), lr=0.02, weight_decay=0.0)
        for _ in range(60):
            optimizer.zero_grad()
            loss(model, {"x": x, "goal": goal}).backward()
            optimizer.step()
        found = float(loss(model, {"x": x, "goal": goal}).detach())
        handle.detach()
        return found

    even = left(LoRA(rank=3, alpha=ALPHA))
    assert left(LoRA(rank="auto", budget=3 * EVEN, alpha=ALPHA)) <= 0.5 * even


@pytest.mark.parametrize("budget", [60, 4 * EVEN + 30, 7 * EVEN - 1])
def test_the_stand_in_for_a_plan_spends_the_budget_evenly(budget: int) -> None:
    handle = lk.attach(Beside(), LoRA(rank="auto", budget=budget, alpha=ALPHA), blank=True)
    found = [update.A.shape[0] for update in handle.updates().values() if isinstance(update, LowRankUpdate)]
    assert budget - max(COSTS) < handle.counts().updates <= budget
    assert max(found) - min(found) <= 2  # what is left over buys one of a cheaper layer
