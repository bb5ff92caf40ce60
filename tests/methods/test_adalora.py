"""AdaLoRA: scores, budget, exact choice, and that what is not kept is really gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.errors import ConfigError, ShapeError
from lorakit.methods.adalora import AdaLoRA, AdaLoRARule, chosen
from lorakit.methods.components import ComponentsUpdate
from lorakit.methods.lora import LoRA

from .ranks_training import Goal, Layers, planted, stepper_of, steps

SIZES = [(20, 14), (12, 22), (24, 18)]
# Sums of some tens of fp32 products of order 1 in another order.
SUM_ORDER = 2e-5


def update_of(handle: lk.Handle, path: str = "layers.0") -> ComponentsUpdate:
    update = handle.updates()[path]
    assert isinstance(update, ComponentsUpdate)
    return update


def rule_of(handle: lk.Handle, num_steps: int) -> AdaLoRARule:
    rule = handle.entry("default").method.rule(handle.updates(), num_steps)
    assert isinstance(rule, AdaLoRARule)
    return rule


def with_gradients(handle: lk.Handle) -> None:
    """Give every parameter a random value and gradient."""
    for parameter in handle.parameters().values():
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)


def test_planted_ranks_are_found_exactly() -> None:
    model, goal = planted(SIZES, [0, 1, 4])
    handle = lk.attach(model, AdaLoRA(rank=2, total=5, init_rank=5, alpha=4.0), seed=1)
    steps(stepper_of(handle, goal, 250), 250)
    assert [update_of(handle, path).rank for path in handle.updates()] == [0, 1, 4]


def test_the_factor_is_that_of_a_lora_of_the_rank_that_is_kept() -> None:
    handle = lk.attach(Layers(SIZES), AdaLoRA(rank=4, alpha=10.0), seed=1)
    assert {update_of(handle, path).scale for path in handle.updates()} == {LoRA(rank=4, alpha=10.0).scale_at("x")}
    assert [update_of(handle, path).rank for path in handle.updates()] == [6, 6, 6]


def test_scores_are_the_papers() -> None:
    handle = lk.attach(Layers(SIZES), AdaLoRA(rank=2, alpha=5.0), seed=1)
    rule = rule_of(handle, 100)
    block = next(update_of(handle).counting())
    smooth: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    for step in (1, 2, 3):
        with_gradients(handle)
        for part, parameter in block.named_parameters():
            assert parameter.grad is not None
            sensitivity = (parameter * parameter.grad).abs().detach()
            smooth[part] = 0.85 * smooth.get(part, torch.zeros(())) + 0.15 * sensitivity
            spread[part] = 0.85 * spread.get(part, torch.zeros(())) + 0.15 * (sensitivity - smooth[part]).abs()
        rule.before_step(step)
    s = {part: smooth[part] * spread[part] for part in smooth}
    torch.testing.assert_close(rule.scores()["layers.0"], s["E"] + s["A"].mean(1) + s["B"].mean(0))


def test_the_penaltys_gradient_is_that_of_the_squared_distance_to_orthonormal() -> None:
    handle = lk.attach(Layers(SIZES), AdaLoRA(rank=2, alpha=5.0, orthogonality=0.3), seed=1)
    with_gradients(handle)
    block = next(update_of(handle).counting())
    before = {
        part: parameter.grad.clone() for part, parameter in block.named_parameters() if parameter.grad is not None
    }
    rule_of(handle, 100).before_step(1)
    A, B = block.A.detach().requires_grad_(), block.B.detach().requires_grad_()
    eye = torch.eye(block.A.shape[0])
    (0.3 * ((A @ A.T - eye).square().sum() + (B.T @ B - eye).square().sum())).backward()
    assert A.grad is not None
    assert B.grad is not None
    torch.testing.assert_close(block.A.grad, before["A"] + A.grad)
    torch.testing.assert_close(block.B.grad, before["B"] + B.grad)


def test_the_penalty_has_no_part_in_the_scores() -> None:
    found = []
    for weight in (0.0, 5.0):
        handle = lk.attach(Layers(SIZES), AdaLoRA(rank=2, alpha=5.0, orthogonality=weight), seed=1)
        rule = rule_of(handle, 100)
        torch.manual_seed(5)
        for step in (1, 2):
            with_gradients(handle)
            rule.before_step(step)
        found.append(rule.scores())
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])


def test_a_step_with_infinite_gradients_changes_no_score() -> None:
    handle = lk.attach(Layers(SIZES), AdaLoRA(rank=2, alpha=5.0), seed=1)
    rule = rule_of(handle, 100)
    with_gradients(handle)
    rule.before_step(1)
    before = rule.scores()
    block = next(update_of(handle).counting())
    assert block.A.grad is not None
    block.A.grad[0, 0] = torch.inf
    rule.before_step(2)
    assert all(torch.equal(each, before[path]) for path, each in rule.scores().items())


def test_the_budget_falls_as_a_cube_from_the_start_to_the_target() -> None:
    rule = rule_of(lk.attach(Layers(SIZES), AdaLoRA(rank=4, alpha=10.0, tinit=10, tfinal=40), seed=1), 100)
    assert (rule.budget(10), rule.budget(60), rule.budget(99)) == (18, 12, 12)
    assert rule.budget(35) == round(12 + 6 * (1 - 25 / 50) ** 3)
    assert [rule.budget(step) for step in range(10, 61)] == sorted(
        [rule.budget(s) for s in range(10, 61)], reverse=True
    )


@pytest.mark.parametrize("count", [0, 1, 4, 7, 9])
def test_as_many_are_chosen_as_asked_for_whatever_scores_are_equal(count: int) -> None:
    equal = {"a": torch.zeros(4), "b": torch.zeros(2), "c": torch.zeros(3)}
    counts = [int(mask.sum()) for mask in chosen(equal, dict.fromkeys(equal, 1), count).values()]
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1 or count > 6  # b has only two


def test_the_best_of_all_layers_are_chosen() -> None:
    masks = chosen({"a": torch.tensor([5.0, 0.0, 3.0]), "b": torch.tensor([4.0, 1.0])}, {"a": 1, "b": 1}, 3)
    assert masks["a"].tolist() == [True, False, True]
    assert masks["b"].tolist() == [True, False]


def test_a_component_dearer_than_what_is_left_is_passed_over() -> None:
    scores = {"dear": torch.tensor([5.0, 4.0]), "cheap": torch.tensor([3.0, 2.0])}
    masks = chosen(scores, {"dear": 10, "cheap": 4}, 18)
    assert {path: mask.tolist() for path, mask in masks.items()} == {"dear": [True, False], "cheap": [True, True]}


@pytest.mark.parametrize("budget", [60, 150, 283])
def test_a_budget_of_numbers_is_spent_and_not_exceeded(budget: int) -> None:
    model, goal = planted(SIZES, [0, 1, 3])
    handle = lk.attach(model, AdaLoRA(rank=2, budget=budget, init_rank=4, alpha=5.0, tinit=5, tfinal=5), seed=1)
    steps(stepper_of(handle, goal, 30), 30)
    assert budget - min(m + n + 1 for m, n in SIZES) < handle.counts().updates <= budget


def test_momentum_does_not_undo_a_choice() -> None:
    model, goal = planted(SIZES, [1, 1, 1])
    handle = lk.attach(model, AdaLoRA(rank=2, alpha=5.0, init_rank=4, tinit=10, tfinal=5, interval=10), seed=1)
    stepper = stepper_of(handle, goal, 120)
    rule = stepper.rule
    assert isinstance(rule, AdaLoRARule)
    while not (rule.chooses(stepper.count) and rule.budget(stepper.count) < 12):
        steps(stepper, 1)
    strengths = torch.cat([block.E for path in handle.updates() for block in update_of(handle, path).counting()])
    assert int((strengths != 0).sum()) == rule.budget(stepper.count)


def final(kept: int = 4) -> tuple[lk.Handle, Goal, list[str]]:
    model, goal = planted(SIZES, [0, 1, 3])
    handle = lk.attach(model, AdaLoRA(rank=2, total=kept, init_rank=4, alpha=5.0, tinit=20, tfinal=40), seed=1)
    stepper = stepper_of(handle, goal, 150)
    steps(stepper, 150)
    model.eval()
    return handle, goal, stepper.heard  # type: ignore[attr-defined]


def test_what_is_not_kept_is_no_parameter_any_more() -> None:
    handle, _, heard = final()
    ranks = [update_of(handle, path).rank for path in handle.updates()]
    assert ranks == [0, 1, 3]
    assert handle.counts().updates == sum(r * (m + n + 1) for r, (m, n) in zip(ranks, SIZES, strict=True))
    assert heard == ["AdaLoRA: 4 of 12 components kept; ranks 0 to 3, 1 of 3 layers without any."]


def test_a_layer_without_components_computes_as_the_base_bit_for_bit() -> None:
    handle, goal, _ = final()
    with torch.no_grad():
        out = handle.model(goal.inputs)[0]
        with handle.disabled():
            assert torch.equal(out, handle.model(goal.inputs)[0])
    assert not handle.delta("layers.0").any()


def test_the_optimizer_remembers_the_components_that_stay() -> None:
    model, goal = planted(SIZES, [0, 1, 3])
    handle = lk.attach(model, AdaLoRA(rank=2, total=4, init_rank=4, alpha=5.0, tinit=20, tfinal=40), seed=1)
    stepper = stepper_of(handle, goal, 150, lr=1e-2)
    rule = stepper.rule
    assert isinstance(rule, AdaLoRARule)
    steps(stepper, rule.last - 1)
    state = stepper.optimizer.state
    block = next(update_of(handle, "layers.2").counting())
    before = {part: (p, state[p]["exp_avg"], state[p]["step"].clone()) for part, p in block.named_parameters()}
    steps(stepper, 1)
    assert rule.final
    # AdamW changes its means in place, so ``before`` holds those of the last step; only the kept rows are there now.
    after = next(update_of(handle, "layers.2").counting())
    old_E, mean_E, _ = before["E"]
    kept = (old_E != 0).nonzero().flatten()
    assert 0 < len(kept) < len(old_E)
    now = stepper.optimizer.state
    assert torch.equal(now[after.A]["exp_avg"], before["A"][1][kept])
    assert torch.equal(now[after.B]["exp_avg"], before["B"][1][:, kept])
    assert after.E is not None
    assert torch.equal(now[after.E]["exp_avg"], mean_E[kept])
    assert now[after.E]["step"] == before["E"][2] + 1


@pytest.mark.parametrize("at", [0, 30, 75, 150])
def test_at_any_moment_the_saved_adapter_is_what_acts(at: int, tmp_path: Path) -> None:
    model, goal = planted(SIZES, [0, 1, 3])
    handle = lk.attach(model, AdaLoRA(rank=2, total=4, init_rank=4, alpha=5.0, tinit=20, tfinal=40), seed=1)
    steps(stepper_of(handle, goal, 150), at)
    with torch.no_grad():
        expected = model.eval()(goal.inputs)
    lk.save(handle, tmp_path / "adapter")
    bare = handle.detach()
    lk.load(bare, tmp_path / "adapter")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(bare(goal.inputs), expected, strict=True))


def test_a_trained_bias_is_saved_also_where_no_component_is_left(tmp_path: Path) -> None:
    model, goal = planted(SIZES, [0, 1, 3])
    method = AdaLoRA(rank=2, total=4, init_rank=4, alpha=5.0, tinit=20, tfinal=40, bias="lora_only")
    handle = lk.attach(model, method, seed=1)
    steps(stepper_of(handle, goal, 150), 150)
    assert update_of(handle).rank == 0
    with torch.no_grad():
        expected = model.eval()(goal.inputs)
        with handle.disabled():
            assert not torch.equal(model(goal.inputs)[0], expected[0])
    lk.save(handle, tmp_path / "adapter")
    bare = handle.detach()
    lk.load(bare, tmp_path / "adapter")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(bare(goal.inputs), expected, strict=True))


def test_the_adapter_of_an_earlier_step_comes_back_into_what_has_become_smaller() -> None:
    model, goal = planted(SIZES, [0, 1, 3])
    handle = lk.attach(model, AdaLoRA(rank=2, total=4, init_rank=4, alpha=5.0, tinit=20, tfinal=40), seed=1)
    stepper = stepper_of(handle, goal, 150)
    steps(stepper, 30)
    early = handle.state()
    steps(stepper, 120)
    handle.set_state(early)
    again = handle.state()
    assert all(torch.equal(again.sites[p].tensors[n], t) for p, s in early.sites.items() for n, t in s.tensors.items())


def experts() -> nn.Module:
    config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    layer = MixtralExperts(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


class Chosen(nn.Module):
    """One layer of some kind, called as it needs to be."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, MixtralExperts):
            weights, index = x[:, :4].softmax(dim=1).topk(2, dim=1)
            return self.layer(x, index, weights)
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


KINDS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 10), torch.randn(4, 6)),
    "part": (nn.Linear(6, 12), torch.randn(4, 6)),
    "transposed": (Conv1D(10, 6), torch.randn(4, 6)),
    "embedding": (nn.Embedding(11, 6), torch.randint(0, 11, (4, 5))),
    "convolution": (nn.Conv2d(3, 5, 3), torch.randn(4, 3, 6, 6)),
    "recurrent": (nn.LSTM(5, 4, batch_first=True), torch.randn(4, 6, 5)),
    "experts": (experts(), torch.randn(4, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_loses_components_and_merges_as_before(kind: str) -> None:
    layer, x = KINDS[kind]
    model = Chosen(layer).eval()
    method = AdaLoRA(rank=2, init_rank=4, alpha=5.0, tinit=0, tfinal=2)
    handle = lk.attach(model, method, "layer[0:4,8:12]" if kind == "part" else "layer", seed=1)
    before = sum(update_of(handle, path).rank for path in handle.updates())
    with torch.no_grad():
        goal = model(x) + torch.randn_like(model(x))

    class Whole(Goal):
        def loss(self, model: nn.Module, batch: object = None, shortcuts: object = None) -> Tensor:
            return (model(x) - goal).square().mean()

    steps(stepper_of(handle, Whole([], []), 8), 8)
    assert sum(update_of(handle, path).rank for path in handle.updates()) == 2 * len(handle.updates()) < before
    model.eval()
    with torch.no_grad():
        unmerged = model(x)
        assert (unmerged - goal).abs().max() > 0
        handle.merge()
        torch.testing.assert_close(model(x), unmerged, rtol=0, atol=SUM_ORDER)
        handle.unmerge()
    handle.detach()


def test_a_run_too_short_for_its_settings_says_what_it_does() -> None:
    model, goal = planted(SIZES, [0, 1, 3])
    handle = lk.attach(model, AdaLoRA(rank=2, alpha=5.0, tinit=500, tfinal=500), seed=1)
    stepper = stepper_of(handle, goal, 10)
    steps(stepper, 10)
    assert "10 steps, fewer than tinit=500 and tfinal=500 together" in stepper.heard[0]  # type: ignore[attr-defined]
    assert sum(update_of(handle, path).rank for path in handle.updates()) == 6


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"total": 100},
            ConfigError,
            "100 components are asked for in the end, but method 'adalora' can come to 1 to 9",
        ),
        (
            {"budget": 30},
            ConfigError,
            "30 numbers are asked for in the end, but method 'adalora' can come to 35 to 339",
        ),
        ({"budget": 90, "total": 4}, ConfigError, "give one of them"),
        ({"rank": 13}, ShapeError, r"rank 13 is above the smaller side of 'layers.1' \(12 x 22\)"),
        ({"tinit": -1}, ConfigError, "tinit"),
        ({"orthogonality": -0.1}, ConfigError, "orthogonality"),
        ({"init": "pissa"}, ConfigError, "unknown field 'init'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lk.attach(Layers(SIZES), {"name": "adalora", "rank": 2, **fields})


def test_dropout_is_refused_where_a_layer_does_not_take_it() -> None:
    with pytest.raises(ConfigError, match=r"dropout=0\.1 cannot act on 'layer\.weight_"):
        lk.attach(Chosen(nn.LSTM(5, 4)), AdaLoRA(rank=2, dropout=0.1), "layer")
