"""Full fine-tuning and head only, as methods: the base stays untouched and comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import TargetError, UnsupportedLayerError

from .models import Tower, tokens_for, train_some_steps

# Two fp32 sums in another order, see test_contract.
SUM_ORDER = 2e-5


@pytest.mark.parametrize("tied", [False, True])
def test_full_trains_every_parameter_once_and_leaves_the_base(tied: bool) -> None:
    model = Tower(tied=tied)
    count = sum(p.numel() for p in model.parameters())
    handle = lk.attach(model, "full")
    before = handle.digest()
    train_some_steps(model, handle, tokens_for())
    assert handle.counts().trained == count
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in handle.parameters().values())
    assert handle.digest() == before


def test_full_merges_and_switches_off() -> None:
    model, tokens = Tower().eval(), tokens_for()
    base = model(tokens)
    handle = lk.attach(model, "full")
    train_some_steps(model, handle, tokens)
    trained = model(tokens)
    assert not torch.equal(trained, base)
    with handle.disabled():
        assert torch.equal(model(tokens), base)
    handle.merge()
    torch.testing.assert_close(model(tokens), trained, rtol=0, atol=SUM_ORDER)


def test_full_equals_training_the_model_itself() -> None:
    torch.manual_seed(0)
    plain = Tower()
    adapted = Tower()
    adapted.load_state_dict(plain.state_dict())
    handle, tokens = lk.attach(adapted, "full"), tokens_for()
    own = torch.optim.SGD(plain.parameters(), lr=0.1)
    theirs = torch.optim.SGD(handle.parameters().values(), lr=0.1)
    for _ in range(3):
        for model, optimizer in ((plain, own), (adapted, theirs)):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(adapted(tokens), plain(tokens), rtol=0, atol=SUM_ORDER)


def test_full_of_a_model_with_parameters_of_its_own_is_refused() -> None:
    class Scaled(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(UnsupportedLayerError, match="'scale' belong to the Scaled itself"):
        lk.attach(Scaled(), "full")


def test_head_trains_the_head_alone() -> None:
    model = Tower()
    handle = lk.attach(model, "head")
    assert list(handle.parameters()) == ["head.weight"]
    train_some_steps(model, handle, tokens_for())
    assert handle.counts().updates == 0


def test_a_model_without_a_head_is_refused_by_head() -> None:
    with pytest.raises(TargetError, match="'head'"):
        lk.attach(nn.Sequential(nn.Linear(3, 4)), "head")
