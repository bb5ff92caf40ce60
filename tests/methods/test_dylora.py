"""DyLoRA: every lower rank is trained, by draws that can be repeated, and can be cut to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError, ShapeError, UnsupportedLayerError
from lorakit.methods.dylora import DyLoRA, DyLoRARule, DyLoRAUpdate, truncated
from lorakit.methods.lora import LoRA

from .ranks_training import Goal, Layers, stepper_of, steps

SIZE, RANK, ALPHA = (14, 20), 4, 6.0
STEPS = 300
# What the nested training may lose to a training at one rank alone (measured: up to 3 %).
MARGIN = 1.1


def problem() -> tuple[Layers, Goal]:
    """Return a layer, and as a goal a change of it with singular values 1, 1/2, 1/3, ..."""
    torch.manual_seed(3)
    model = Layers([SIZE])
    layer = model.layers[0]
    U, V = torch.linalg.qr(torch.randn(14, 14)).Q, torch.linalg.qr(torch.randn(20, 14)).Q
    x = torch.randn(128, 20)
    goal = (layer(x) + x @ ((U / torch.arange(1, 15)) @ V.T).T).detach()
    return model, Goal([x], [goal])


def losses_of(method: LoRA, ranks: range) -> list[float]:
    """Return the losses of one training cut to these ranks."""
    model, goal = problem()
    handle = lk.attach(model, method, seed=1)
    steps(stepper_of(handle, goal, STEPS), STEPS)
    state = handle.state()
    found = []
    for rank in ranks:
        bare, _ = problem()
        lk.Handle(bare).add_state(truncated(state, rank))
        with torch.no_grad():
            found.append(goal.loss(bare.eval()).item())
    return found


@pytest.fixture(scope="module")
def nested() -> list[float]:
    return losses_of(DyLoRA(rank=RANK, alpha=ALPHA), range(1, RANK + 1))


@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_cut_to_a_rank_it_is_nearly_as_good_as_trained_at_that_rank_alone(rank: int, nested: list[float]) -> None:
    alone = losses_of(LoRA(rank=rank, alpha=ALPHA / RANK * rank), range(rank, rank + 1))[0]
    assert nested[rank - 1] <= MARGIN * alone


def test_cut_to_any_lower_rank_it_is_better_than_plain_lora_cut(nested: list[float]) -> None:
    plain = losses_of(LoRA(rank=RANK, alpha=ALPHA), range(1, RANK))
    assert all(own < other for own, other in zip(nested, plain, strict=False))


def attached(**fields: object) -> tuple[lk.Handle, Tensor]:
    model = Layers([SIZE])
    handle = lk.attach(model, {"name": "dylora", "rank": RANK, "alpha": ALPHA, **fields}, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.normal_()
    return handle, torch.randn(5, 20)


def update_of(handle: lk.Handle) -> DyLoRAUpdate:
    update = handle.updates()["layers.0"]
    assert isinstance(update, DyLoRAUpdate)
    return update


@pytest.mark.parametrize("count", range(1, RANK + 1))
def test_in_training_the_first_components_act_with_the_factor_of_the_full_rank(count: int) -> None:
    handle, x = attached()
    update, layer = update_of(handle), handle.model.get_submodule("layers.0")
    update.act(count)
    with torch.no_grad(), handle.disabled():
        base = layer(x)
    with torch.no_grad():
        found = handle.model.train()([x])[0]
        expected = base + ALPHA / RANK * x @ update.A[:count].T @ update.B[:, :count].T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_components_that_do_not_act_get_no_gradient() -> None:
    handle, x = attached()
    update_of(handle).act(2)
    handle.model.train()([x])[0].square().sum().backward()
    update = update_of(handle)
    assert update.A.grad is not None
    assert update.B.grad is not None
    assert not update.A.grad[2:].any()
    assert not update.B.grad[:, 2:].any()
    assert update.A.grad[:2].abs().min() > 0


def test_in_use_all_components_act() -> None:
    handle, x = attached()
    with torch.no_grad():
        expected = handle.model.eval()([x])[0]
        update_of(handle).act(1)
        assert torch.equal(handle.model.eval()([x])[0], expected)


def rule_of(handle: lk.Handle) -> DyLoRARule:
    rule = handle.entry("default").method.rule(handle.updates(), 100)
    assert isinstance(rule, DyLoRARule)
    return rule


@pytest.mark.parametrize(("lowest", "expected"), [(1, {1, 2, 3, 4}), (3, {3, 4})])
def test_every_rank_from_the_lowest_is_drawn_about_as_often(lowest: int, expected: set[int]) -> None:
    handle, _ = attached(rank_min=lowest)
    drawn = [rule_of(handle).drawn(step) for step in range(1, 2001)]
    assert set(drawn) == expected
    # The spread of a count of 2000 / 4 is about 20: five of them.
    assert all(abs(drawn.count(rank) - 2000 / len(expected)) < 120 for rank in expected)


def test_draws_follow_from_the_seed_and_the_step_alone() -> None:
    first, second = (rule_of(attached()[0]) for _ in range(2))
    torch.manual_seed(99)
    assert [first.drawn(step) for step in range(50)] == [second.drawn(step) for step in range(50)]


def test_a_rule_that_is_loaded_goes_on_with_the_next_draw() -> None:
    handle, _ = attached()
    rule = rule_of(handle)
    for step in range(1, 8):
        rule.after_step(step)
    acting = update_of(handle).acting.clone()
    other, _ = attached()
    rule_of(other).load(rule.state())
    assert torch.equal(update_of(other).acting, acting)


def test_what_is_saved_is_plain_lora() -> None:
    state = attached()[0].state()
    assert state.method == LoRA(rank=RANK, alpha=ALPHA)


def test_ranks_by_layer_are_cut_each_to_at_most_the_rank_asked_for() -> None:
    model = Layers([(14, 20), (10, 12)])
    handle = lk.attach(model, DyLoRA(rank=4, alpha=ALPHA, rank_pattern={"layers.1": 2}), seed=1)
    cut = truncated(handle.state(), 3)
    assert [site.tensors["A"].shape[0] for site in cut.sites.values()] == [3, 2]
    assert isinstance(cut.method, LoRA)
    assert [cut.method.scale_at(path) for path in cut.sites] == pytest.approx([ALPHA / 4, ALPHA / 2])


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(ShapeError, match=f"cannot cut to rank {rank}: the adapter's ranks go from 1 to 4"):
        truncated(attached()[0].state(), rank)


def test_what_is_no_plain_pair_is_refused() -> None:
    handle = lk.attach(Layers([SIZE]), lk.DoRA(rank=2), seed=1)
    with pytest.raises(UnsupportedLayerError, match=r"of method 'dora', with other tensors at 'layers\.0'"):
        truncated(handle.state(), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rank_min": 5}, "rank_min 5 is above rank 4"), ({"init": "pissa"}, "starts with a pair that cannot be cut")],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attached(**fields)


def test_the_number_that_acts_can_change_without_a_new_graph() -> None:
    handle, x = attached()
    torch._dynamo.reset()
    compiled = torch.compile(handle.model.train(), fullgraph=True, backend="aot_eager")
    compiled([x])
    update_of(handle).act(2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = compiled([x])[0]
    torch.testing.assert_close(found, handle.model([x])[0])
    assert isinstance(handle.model, nn.Module)
