"""Starts with ``B A != 0`` that keep the model's function: on every kind of layer, trained, merged and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ShapeError
from lorakit.inits import find_init, init_names
from lorakit.layers import Site
from lorakit.methods.lora import LowRankUpdate

from .models import ALPHA, KINDS, RANK, ROWS, OneLayer, Tower, float_inputs, one_layer, tokens_for, train_some_steps

# As in the contract test: two fp32 sums in another order.
SUM_ORDER = 2e-5

# Those that examples decide are tested where the examples are.
SHIFTED = [name for name in init_names() if find_init(name).shifts and find_init(name).looks() is None]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
each_init = pytest.mark.parametrize("init", SHIFTED)
cells = pytest.mark.parametrize(("init", "kind"), [(init, kind) for init in SHIFTED for kind in KINDS])
methods = pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])


def started(init: str, kind: str = "linear", method: type[lk.LoRA] = lk.LoRA, **fields: object) -> tuple:
    model = one_layer(kind).eval()
    settings = {"rank": RANK, "alpha": ALPHA, **fields}
    handle = lk.attach(model, method(init=init, **settings), KINDS[kind].target, seed=0)
    return model, handle, KINDS[kind].inputs(ROWS)


def trained(init: str, kind: str = "linear", method: type[lk.LoRA] = lk.LoRA, **fields: object) -> tuple:
    model, handle, x = started(init, kind, method, **fields)
    train_some_steps(model, handle, x)
    return model, handle, x


def pairs(handle: Handle) -> dict[str, LowRankUpdate]:
    return {path: update for path, update in handle.updates().items() if isinstance(update, LowRankUpdate)}


def test_there_are_starts_to_test() -> None:
    assert {"pissa", "milora", "olora"} <= set(SHIFTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cells
def test_attaching_changes_no_bit_of_the_output(init: str, kind: str, dtype: torch.dtype) -> None:
    model = one_layer(kind, dtype).eval()
    x = float_inputs(KINDS[kind].inputs(ROWS), dtype)
    with torch.no_grad():
        before = model(x)
        handle = lk.attach(model, lk.LoRA(rank=RANK, alpha=ALPHA, init=init), KINDS[kind].target)
        assert all(update.A0.abs().sum() > 0 for update in pairs(handle).values())
        assert torch.equal(model(x), before)


@cells
def test_the_frozen_start_is_of_the_weight_and_every_parameter_gets_a_gradient(init: str, kind: str) -> None:
    model, handle, x = started(init, kind)
    for path, update in pairs(handle).items():
        part = update.scale * update.B0 @ update.A0
        W = Site.at(model, path).matrix()
        assert torch.linalg.matrix_norm(part).max() <= torch.linalg.matrix_norm(W).max() * (1 + SUM_ORDER)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters().values())


@methods
@cells
def test_merged_equals_unmerged(init: str, kind: str, method: type[lk.LoRA]) -> None:
    model, handle, x = trained(init, kind, method)
    unmerged = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), unmerged, rtol=0, atol=SUM_ORDER)


@methods
@cells
def test_saved_it_is_a_plain_adapter_of_twice_the_rank_that_acts_alike(
    init: str, kind: str, method: type[lk.LoRA]
) -> None:
    model, handle, x = trained(init, kind, method)
    with torch.no_grad():
        state, out = handle.state(), model(x)
    assert state.method.init.name == "kaiming"
    assert {state.method.rank_at(path) for path in state.sites} == {2 * RANK}
    pristine = copy.deepcopy(handle.detach())
    Handle(pristine).add_state(state)
    with torch.no_grad():
        assert torch.equal(pristine(x), out)


SETTINGS: list[dict[str, object]] = [
    {"scaling": "rslora"},
    {"dropout": 0.3},
    {"rank_pattern": {"layer": 2}},
    {"alpha_pattern": {"layer": 11.0}, "scaling": "rslora"},
]
WITH_BIAS: dict[str, object] = {"bias": "lora_only"}
SET = [(kind, fields) for kind in ("linear", "transposed", "conv2d", "embedding") for fields in SETTINGS]
SET += [(kind, WITH_BIAS) for kind in ("linear", "transposed", "conv2d")]


@pytest.mark.parametrize(("kind", "fields"), SET, ids=[f"{kind} {' '.join(fields)}" for kind, fields in SET])
@methods
@each_init
def test_settings_act_alike_before_and_after_saving(
    init: str, kind: str, method: type[lk.LoRA], fields: dict[str, object]
) -> None:
    model, handle, x = trained(init, kind, method, **fields)
    with torch.no_grad():
        state, out = handle.state(), model(x)
        handle.merge()
        torch.testing.assert_close(model(x), out, rtol=0, atol=SUM_ORDER)
        handle.unmerge()
    pristine = copy.deepcopy(handle.detach())
    Handle(pristine).add_state(state)
    with torch.no_grad():
        torch.testing.assert_close(pristine(x), out, rtol=0, atol=SUM_ORDER)


@methods
@each_init
def test_an_adapter_in_bf16_is_saved_as_it_acts(init: str, method: type[lk.LoRA]) -> None:
    model = one_layer("linear").eval()
    x = KINDS["linear"].inputs(ROWS)
    handle = lk.attach(model, method(rank=RANK, alpha=ALPHA, init=init), "layer", dtype=torch.bfloat16)
    train_some_steps(model, handle, x)
    with torch.no_grad():
        state, out = handle.state(), model(x)
    pristine = copy.deepcopy(handle.detach())
    Handle(pristine).add_state(state)
    with torch.no_grad():
        assert torch.equal(pristine(x), out)


@each_init
def test_weight_decay_alone_draws_the_update_to_the_base(init: str) -> None:
    _, handle, _ = trained(init)
    before = handle.delta("layer").norm()
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=0.1, weight_decay=1.0)
    for parameter in handle.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(60):
        optimizer.step()
    assert handle.delta("layer").norm() < 0.01 * before


@methods
@each_init
def test_a_state_of_this_run_comes_back_to_the_last_bit(init: str, method: type[lk.LoRA]) -> None:
    model, handle, x = trained(init, method=method)
    kept = handle.state()
    before = {name: tensor.detach().clone() for name, tensor in handle.parameters().items()}
    train_some_steps(model, handle, x, steps=2)
    handle.set_state(kept)
    found = handle.state()
    for path, site in kept.sites.items():
        for name, tensor in site.tensors.items():
            assert torch.equal(found.sites[path].tensors[name], tensor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in handle.parameters().items())


@methods
@each_init
def test_state_and_rule_bring_another_start_to_this_one_to_the_last_bit(init: str, method: type[lk.LoRA]) -> None:
    _, handle, _ = trained(init, method=method)
    rule = handle.entry("default").method.rule(handle.updates(), 1)
    kept, remembered = handle.state(), rule.state()
    other = one_layer("linear").eval()  # another weight, so another start
    again = lk.attach(other, method(rank=RANK, alpha=ALPHA, init=init), "layer")
    again.set_state(kept)
    again.entry("default").method.rule(again.updates(), 1).load(remembered)
    for path, update in pairs(handle).items():
        mine = pairs(again)[path]
        assert all(torch.equal(getattr(mine, name), getattr(update, name)) for name in ("A", "B", "A0", "B0"))


@each_init
def test_a_rank_above_the_smaller_side_is_refused_by_name(init: str) -> None:
    with pytest.raises(ShapeError, match=r"rank 9 is above the smaller side of 'blocks\.0\.up' \(16 x 8\)"):
        lk.attach(Tower(), lk.LoRA(rank=9, init=init))


@each_init
def test_the_largest_rank_is_allowed_and_saved(init: str) -> None:
    model = Tower()
    handle = lk.attach(model, lk.LoRA(rank=8, init=init), ["up", "down"])
    tokens = tokens_for()
    train_some_steps(model, handle, tokens)
    with torch.no_grad():
        out, state = model(tokens), handle.state()
        Handle(handle.detach()).add_state(state)
        assert torch.equal(model(tokens), out)


@each_init
def test_layers_of_rank_0_are_left_alone_and_loaded_again(init: str) -> None:
    model = Tower()
    handle = lk.attach(model, lk.LoRA(rank=2, init=init, rank_pattern={"down": 0, "head": 3}))
    tokens = tokens_for()
    train_some_steps(model, handle, tokens)
    with torch.no_grad():
        out, state = model(tokens), handle.state()
        assert set(state.sites) == {"blocks.0.up", "blocks.1.up", "head"}
        Handle(handle.detach()).add_state(state)
        assert torch.equal(model(tokens), out)


@each_init
def test_two_adapters_have_their_own_starts_on_one_base(init: str) -> None:
    model, handle, x = trained(init, "linear")
    alone = model(x)
    handle.add("second", lk.LoRA(rank=2, alpha=ALPHA, init=init), "layer")
    handle.use("default")
    assert torch.equal(model(x), alone)
    handle.use("second")
    with torch.no_grad(), handle.disabled():
        base = model(x)
    assert torch.equal(model(x), base)


def test_a_step_of_plain_lora_on_the_shifted_base_is_the_same_step() -> None:
    """What the paper does, with the residual in the base's place, in fp64: the same pair after the same steps."""
    model = OneLayer(nn.Linear(6, 10)).double()
    W = model.layer.weight.detach().clone()
    handle = lk.attach(model, lk.LoRA(rank=RANK, alpha=ALPHA, init="pissa"), "layer", dtype=torch.float64)
    update = handle.updates()["layer"]
    assert isinstance(update, LowRankUpdate)
    A, B = (tensor.clone().requires_grad_() for tensor in (update.A0, update.B0))
    residual = W - update.scale * (B @ A).detach()
    x, goal = torch.randn(20, 6).double(), torch.randn(20, 10).double()
    ours = torch.optim.SGD(handle.parameters().values(), lr=0.05)
    theirs = torch.optim.SGD([A, B], lr=0.05)

    def loss_of(out: Tensor) -> Tensor:
        return (out - goal).square().mean()

    for _ in range(5):
        ours.zero_grad()
        theirs.zero_grad()
        loss_of(model(x)).backward()
        loss_of(nn.functional.linear(x, residual + update.scale * B @ A, model.layer.bias)).backward()
        ours.step()
        theirs.step()
    torch.testing.assert_close(update.A0 + update.A, A, rtol=0, atol=1e-12)
    torch.testing.assert_close(update.B0 + update.B, B, rtol=0, atol=1e-12)
