"""IncreLoRA: growth where most is missing, exactly to the budget, and without a change of what is computed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.methods.components import RESERVE, Block, ComponentsUpdate
from lorakit.methods.increlora import IncreLoRA, IncreLoRARule
from lorakit.methods.lora import LoRA
from lorakit.training.stepper import Stepper

from .ranks_training import Goal, Layers, planted, stepper_of, steps

SIZES = [(20, 14), (12, 22), (24, 18)]
METHOD = IncreLoRA(rank=3, total=8, alpha=6.0)
# In use a growth adds components of strength 0: the same numbers, at most summed in another order.
IN_USE = 1e-6
# In training a reserve acts with a millionth (RESERVE squared) of a component of unit size.
IN_TRAINING = 1e-5


def update_of(handle: lk.Handle, path: str = "layers.0") -> ComponentsUpdate:
    update = handle.updates()[path]
    assert isinstance(update, ComponentsUpdate)
    return update


def ranks_of(handle: lk.Handle) -> list[int]:
    return [update_of(handle, path).rank for path in handle.updates()]


def started(method: IncreLoRA = METHOD, num_steps: int = 200, ranks: tuple[int, ...] = (1, 2, 5)) -> Stepper:
    model, goal = planted(SIZES, ranks)
    return stepper_of(lk.attach(model, method, seed=1), goal, num_steps)


def rule_of(stepper: Stepper) -> IncreLoRARule:
    assert isinstance(stepper.rule, IncreLoRARule)
    return stepper.rule


@torch.no_grad()
def outputs(stepper: Stepper, training: bool) -> Tensor:
    goal = stepper.task
    assert isinstance(goal, Goal)
    found = torch.cat([out.flatten() for out in stepper.handle.model.train(training)(goal.inputs)])
    stepper.handle.model.train()
    return found


def test_planted_ranks_are_found() -> None:
    stepper = started(num_steps=300)
    steps(stepper, 300)
    assert ranks_of(stepper.handle) == [1, 2, 5]


def test_growth_is_not_seen_in_what_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = started()
    rule, changes = rule_of(stepper), []
    after_step = rule.after_step

    def watched(step: int) -> None:
        count, before = rule.count(), [outputs(stepper, training) for training in (False, True)]
        after_step(step)
        if rule.count() > count:
            after = [outputs(stepper, training) for training in (False, True)]
            changes.append([float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)])

    monkeypatch.setattr(rule, "after_step", watched)
    steps(stepper, 200)
    assert len(changes) == 5
    assert max(use for use, _ in changes) <= IN_USE
    assert max(training for _, training in changes) <= IN_TRAINING


@pytest.mark.parametrize("num_steps", [1, 3, 8, 40])
@pytest.mark.parametrize("total", [3, 4, 9, 23])
def test_the_budget_is_met_exactly_and_never_exceeded(num_steps: int, total: int) -> None:
    stepper = started(IncreLoRA(rank=3, total=total, alpha=6.0), num_steps)
    counts = [rule_of(stepper).count()]
    for _ in range(num_steps):
        steps(stepper, 1)
        counts.append(rule_of(stepper).count())
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (3, total)


@pytest.mark.parametrize("num_steps", [3, 40])
@pytest.mark.parametrize("budget", [113, 200, 431])
def test_a_budget_of_numbers_is_spent_and_never_exceeded(num_steps: int, budget: int) -> None:
    stepper = started(IncreLoRA(rank=3, budget=budget, alpha=6.0), num_steps)
    numbers = []
    for _ in range(num_steps):
        steps(stepper, 1)
        numbers.append(sum(r * (m + n + 1) for r, (m, n) in zip(ranks_of(stepper.handle), SIZES, strict=True)))
    assert numbers == sorted(numbers)
    assert budget - min(m + n + 1 for m, n in SIZES) < numbers[-1] <= budget
    assert stepper.handle.counts().updates == numbers[-1]


def test_no_layer_grows_above_its_smaller_side() -> None:
    model, goal = planted([(2, 30), (24, 18)], [2, 1])
    stepper = stepper_of(lk.attach(model, IncreLoRA(rank=2, total=20, alpha=4.0), seed=1), goal, 30)
    steps(stepper, 30)
    assert ranks_of(stepper.handle) == [2, 18]


def test_the_reserves_are_gone_when_the_budget_is_met() -> None:
    stepper = started()
    assert all(len(update_of(stepper.handle, path).reserve) == 1 for path in stepper.handle.updates())
    steps(stepper, 200)
    ranks = ranks_of(stepper.handle)
    assert stepper.handle.counts().updates == sum(r * (m + n + 1) for r, (m, n) in zip(ranks, SIZES, strict=True))
    assert stepper.heard == [  # type: ignore[attr-defined]
        f"IncreLoRA: 3 components have grown to 8 in 5 choices; ranks {min(ranks)} to {max(ranks)}."
    ]


def test_a_reserve_acts_in_training_alone_and_is_not_saved() -> None:
    stepper = started()
    steps(stepper, 5)
    update = update_of(stepper.handle)
    assert update.train().pair(update.training)[0].shape[0] == 2  # type: ignore[index]
    assert update.tensors()["A"].shape[0] == 1
    before = outputs(stepper, training=False)
    for block in update.reserved():
        block.A.data.normal_()
    assert torch.equal(outputs(stepper, training=False), before)


def test_what_is_in_reserve_is_orthogonal_to_what_acts_and_learns() -> None:
    stepper = started()
    reserve = next(update_of(stepper.handle).reserved())
    before = reserve.A.detach().clone()
    steps(stepper, 15)
    acting = next(update_of(stepper.handle).counting())
    assert (reserve.A - before).norm() > 0.1
    torch.testing.assert_close(reserve.A.norm(), torch.ones(()))
    # Orthogonal to rows that are themselves only nearly of unit length.
    assert (reserve.A @ acting.A.T).abs().max() < 0.05


def test_a_score_is_the_slope_of_the_loss_in_the_strength_of_the_reserve() -> None:
    model, goal = planted(SIZES, (1, 2, 5), batch=None)
    handle = lk.attach(model, METHOD.replaced(beta=0.0), seed=1)
    stepper = stepper_of(handle, goal, 200)
    steps(stepper, 10)
    rule, update = rule_of(stepper), update_of(handle, "layers.2")
    goal.loss(model.train()).backward()
    rule.before_step(11)
    block = next(update.reserved())
    size = 1e-3
    probe = Block(block.A.detach(), torch.tensor([size]), block.B.detach())
    update.blocks.append(probe)
    losses = []
    for sign in (1.0, -1.0):
        probe.E.data.fill_(sign * size)  # type: ignore[union-attr]
        losses.append(goal.loss(model).item())
    slope = (losses[0] - losses[1]) / (2 * size)
    # A central difference in fp32: rounding of a loss near 5 over a step of 2e-3.
    assert rule.scores()[block] == pytest.approx(-slope, rel=5e-3, abs=5e-4)


def test_the_reserves_gradients_are_raised_but_not_above_those_that_act() -> None:
    stepper = started()
    rule, goal = rule_of(stepper), stepper.task
    steps(stepper, 3)
    assert isinstance(goal, Goal)
    goal.loss(stepper.handle.model).backward()
    blocks = [next(update_of(stepper.handle, path).reserved()) for path in stepper.handle.updates()]
    before = torch.cat([block.A.grad.flatten() for block in blocks if block.A.grad is not None]).norm()
    acting = [b for p in stepper.handle.updates() for b in update_of(stepper.handle, p).counting()]
    bound = torch.cat([p.grad.flatten() for b in acting for p in b.parameters() if p.grad is not None]).norm()
    rule.before_step(4)
    raised = torch.cat([block.A.grad.flatten() for block in blocks if block.A.grad is not None]).norm()
    assert before * 10 < raised <= min(float(bound), float(before) / RESERVE**2) * 1.001


def test_new_components_have_a_group_of_their_own_whose_rate_rises() -> None:
    stepper = started()
    steps(stepper, rule_of(stepper).first)
    groups = stepper.optimizer.param_groups
    assert [group.get("born", 0) for group in groups] == [0, rule_of(stepper).first]
    assert groups[1]["warmup"] == rule_of(stepper).every
    steps(stepper, 1)
    groups = stepper.optimizer.param_groups
    assert groups[1]["lr"] == pytest.approx(groups[0]["lr"] / rule_of(stepper).every)


def test_a_component_takes_what_the_optimizer_remembers_of_it_along() -> None:
    stepper = started()
    rule = rule_of(stepper)
    steps(stepper, rule.first - 1)
    reserves = {
        b: stepper.optimizer.state[b.A]["step"]
        for p in stepper.handle.updates()
        for b in update_of(stepper.handle, p).reserved()
    }
    steps(stepper, 1)
    grown = [block for block in reserves if block.E is not None]
    assert len(grown) == 1
    assert float(stepper.optimizer.state[grown[0].A]["step"]) == rule.first


def test_choices_are_spread_over_the_time_there_is() -> None:
    rule = rule_of(started(num_steps=200))
    assert rule.events[0] == 20
    assert rule.events[-1] == 120
    assert len({b - a for a, b in pairwise(rule.events)}) == 1


def test_the_factor_is_that_of_a_lora_of_the_rank_in_the_end() -> None:
    stepper = started()
    steps(stepper, 200)
    state = stepper.handle.state()
    assert isinstance(state.method, LoRA)
    for path, site in state.sites.items():
        assert state.method.scale_at(path, site.tensors["A"].shape[0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total": 2}, "2 components are asked for in the end, but method 'increlora' can come to 3 to 44 on these 3"),
        ({"budget": 100}, "100 numbers are asked for in the end, but method 'increlora' can come to 113 to"),
        ({"init_rank": 0}, "init_rank"),
        ({"beta": 1.0}, "beta"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.attach(Layers(SIZES), {"name": "increlora", "rank": 2, **fields})


@pytest.mark.parametrize("layer", [nn.Embedding(11, 6), nn.Conv2d(3, 5, 3), nn.LSTM(5, 4, batch_first=True)], ids=repr)
def test_other_kinds_of_layers_grow_too(layer: nn.Module) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out[0] if isinstance(out, tuple) else out

    inputs = {"Embedding": torch.randint(0, 11, (4, 5)), "Conv2d": torch.randn(4, 3, 6, 6)}
    x, model = inputs.get(type(layer).__name__, torch.randn(4, 6, 5)), One()
    with torch.no_grad():
        wanted = model(x) + torch.randn_like(model(x))

    class Whole(Goal):
        def loss(self, model: nn.Module, batch: object = None, shortcuts: object = None) -> Tensor:
            return (model(x) - wanted).square().mean()

    handle = lk.attach(model, IncreLoRA(rank=3, alpha=5.0), "layer", seed=1)
    steps(stepper_of(handle, Whole([], []), 12), 12)
    assert sum(ranks_of(handle)) == 3 * len(handle.updates())
