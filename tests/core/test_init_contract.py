"""The contract of initialisations: every one on the kinds of layers it supports, with alpha != rank, nothing square."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import UnsupportedLayerError
from lorakit.inits import find_init, init_names
from lorakit.methods.lora import LoRA

from .models import FAMILIES, KINDS, OneLayer, one_layer, sites_of_kind, train_some_steps

RANK, ALPHA, ROWS = 3, 5.0, 8
# Two fp32 sums over at most 36 terms in another order; a start that is not zero brings terms of the weight's own size.
SUM_ORDER = 5e-5
INITS: dict[str, Any] = {name: {"name": name} for name in init_names()}
INITS["corda, knowledge"] = {"name": "corda", "keep": "knowledge"}
WIDE = ("loraga",)  # looks at gradients, which every kind has: tried on all

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def refused(init: str, kind: str) -> bool:
    method = LoRA(rank=RANK, alpha=ALPHA, init=INITS[init])
    return any(method.refusal(site) is not None for site in sites_of_kind(one_layer(kind), kind))


EVERY = [(init, kind) for init in INITS for kind in (KINDS if init in WIDE else FAMILIES)]
REFUSED = [cell for cell in EVERY if refused(*cell)]
cells = pytest.mark.parametrize(("init", "kind"), [cell for cell in EVERY if cell not in REFUSED])


def calibration(kind: str) -> lk.Calibration:
    """Return two batches, and a loss that depends on the layer."""
    return lk.Calibration(
        [{"x": KINDS[kind].inputs(ROWS)} for _ in range(2)],
        loss=lambda model, batch: model(batch["x"]).float().square().mean(),
    )


def attached(init: str, kind: str, model: OneLayer | None = None) -> tuple[OneLayer, Handle, Tensor]:
    model = one_layer(kind).eval() if model is None else model
    method = LoRA(rank=RANK, alpha=ALPHA, init=INITS[init])
    handle = lk.attach(model, method, KINDS[kind].target, calibration=calibration(kind), seed=1)
    return model, handle, KINDS[kind].inputs(ROWS)


@cells
def test_the_output_is_unchanged_at_the_start_unless_that_is_declared(init: str, kind: str) -> None:
    model = one_layer(kind).eval()
    x = KINDS[kind].inputs(ROWS)
    with torch.no_grad():
        before = model(x)
        _, handle, _ = attached(init, kind, model)
        assert torch.equal(model(x), before) != handle.entry("default").method.changes_start()


@cells
def test_merged_equals_unmerged(init: str, kind: str) -> None:
    model, handle, x = attached(init, kind)
    train_some_steps(model, handle, x)
    unmerged = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), unmerged, rtol=SUM_ORDER, atol=SUM_ORDER)


@cells
def test_looking_and_training_leave_every_bit_of_the_base(init: str, kind: str) -> None:
    model = one_layer(kind).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, handle, x = attached(init, kind, model)
    train_some_steps(model, handle, x)
    handle.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@cells
def test_a_saved_adapter_is_a_plain_pair_that_comes_back_bit_for_bit(init: str, kind: str) -> None:
    model, handle, x = attached(init, kind)
    train_some_steps(model, handle, x)
    with torch.no_grad():
        state, out = handle.state(), model(x)
    other = copy.deepcopy(handle.detach())
    Handle(other).add_state(state)
    assert isinstance(state.method, LoRA)
    assert not state.method.init.shifts
    with torch.no_grad():
        torch.testing.assert_close(other(x), out, rtol=0, atol=0)


@cells
def test_training_moves_every_parameter(init: str, kind: str) -> None:
    model, handle, x = attached(init, kind)
    before = {name: p.detach().clone() for name, p in handle.parameters().items()}
    train_some_steps(model, handle, x)
    assert all(not torch.equal(p, before[name]) for name, p in handle.parameters().items())


@pytest.mark.parametrize(("init", "kind"), REFUSED)
def test_a_layer_that_an_init_cannot_start_on_is_refused_by_name(init: str, kind: str) -> None:
    model = one_layer(kind)
    with pytest.raises(UnsupportedLayerError, match=f"{KINDS[kind].target.split('[')[0]}.*(?s:.)*Exclude these"):
        attached(init, kind, model)
    assert not hasattr(model, "_lorakit_handle") or not lk.handle_of(model).names


@pytest.mark.parametrize("init", INITS)
def test_in_bf16_the_start_is_unchanged_too(init: str) -> None:
    model = OneLayer(nn.Linear(12, 20)).to(torch.bfloat16).eval()
    x = torch.randn(ROWS, 5, 12, dtype=torch.bfloat16)
    batches = lk.Calibration([{"x": x}], loss=lambda model, batch: model(batch["x"]).float().square().mean())
    with torch.no_grad():
        before = model(x)
        method = LoRA(rank=RANK, alpha=ALPHA, init=INITS[init])
        lk.attach(model, method, "layer", calibration=batches, dtype=torch.bfloat16)
        assert torch.equal(model(x), before) != find_init(INITS[init]).changes_start


@pytest.mark.parametrize("kind", ["linear", "transposed"])
@pytest.mark.parametrize("init", INITS)
def test_peft_loads_what_was_trained(init: str, kind: str, tmp_path: Path) -> None:
    if (init, kind) in REFUSED:
        pytest.skip("the init does not start on this kind of layer")
    model, handle, x = attached(init, kind)
    train_some_steps(model, handle, x)
    expected = model(x)
    lk.save(handle, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(handle.detach()), str(tmp_path))
    torch.testing.assert_close(theirs(x), expected, rtol=SUM_ORDER, atol=SUM_ORDER)


@pytest.mark.parametrize("init", INITS)
def test_the_same_seed_and_examples_give_the_same_start(init: str) -> None:
    torch.manual_seed(3)
    first = attached(init, "linear", OneLayer(nn.Linear(6, 10)))[1].state()
    torch.manual_seed(3)
    second = attached(init, "linear", OneLayer(nn.Linear(6, 10)))[1].state()
    assert all(torch.equal(t, second.sites["layer"].tensors[name]) for name, t in first.sites["layer"].tensors.items())
