"""A saved adapter as plain data: independent of the model, complete, and refused where it does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapters import AdapterState, Handle
from lorakit.errors import ShapeError, TargetError

from .models import METHODS, OneLayer, Tower, fill_with_noise, method_named, tokens_for


def state_of(method: str = "lora", **fields: object) -> AdapterState:
    handle = lk.attach(Tower(), method_named(method, **fields), "up,head", train_modules="norm")
    fill_with_noise(handle)
    return handle.state()


@pytest.mark.parametrize("method", METHODS)
def test_a_state_shares_no_memory_with_the_model(method: str) -> None:
    model, tokens = Tower().eval(), tokens_for()
    handle = lk.attach(model, method_named(method), "up", train_modules="norm,head")
    fill_with_noise(handle)
    out, state = model(tokens), handle.state()
    for tensors in (*(site.tensors for site in state.sites.values()), *state.modules.values()):
        for tensor in tensors.values():
            assert not tensor.requires_grad
            tensor.zero_()
    assert torch.equal(model(tokens), out)


def test_a_state_says_where_what_and_of_which_base_it_is() -> None:
    state = state_of(bias="lora_only")
    assert list(state.sites) == ["blocks.0.up", "blocks.1.up", "head"]
    assert {site.kind for site in state.sites.values()} == {"linear"}
    assert state.sites["head"].weight_shape == (13, 8)
    assert {name: tuple(t.shape) for name, t in state.sites["head"].tensors.items()} == {"A": (3, 8), "B": (13, 3)}
    assert set(state.biases) == {"blocks.0.up", "blocks.1.up"}
    assert set(state.modules) == {"norm"}
    assert state.targets == ("head", "up")
    assert state.identity is not None
    assert state.identity.excluded == ("norm",)


def test_a_convolutions_state_keeps_its_native_shape() -> None:
    handle = lk.attach(OneLayer(nn.Conv2d(3, 5, (3, 2))), lk.LoRA(rank=2), "layer")
    site = handle.state().sites["layer"]
    assert (site.kind, site.weight_shape) == ("conv2d", (5, 3, 3, 2))
    assert site.tensors["A"].shape == (2, 18)


def test_an_adapter_that_comes_back_does_not_train_unless_asked() -> None:
    state = state_of()
    for trainable in (False, True):
        handle = Handle(Tower())
        handle.add_state(state, trainable=trainable)
        assert {p.requires_grad for p in handle.parameters().values()} == {trainable}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_an_adapter_comes_back_in_its_own_dtype(dtype: torch.dtype) -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2), "up", dtype=dtype)
    fill_with_noise(handle)
    state = handle.state()
    again = Handle(Tower())
    again.add_state(state)
    found = again.state().sites["blocks.0.up"].tensors
    assert found["A"].dtype == dtype
    assert all(torch.equal(tensor, state.sites["blocks.0.up"].tensors[name]) for name, tensor in found.items())


def test_a_linear_adapter_fits_the_transposed_layer() -> None:
    linear = OneLayer(nn.Linear(6, 10))
    transposed = OneLayer(Conv1D(10, 6))
    with torch.no_grad():
        transposed.layer.weight.copy_(linear.layer.weight.t())
        transposed.layer.bias.copy_(linear.layer.bias)
    handle = lk.attach(linear, lk.LoRA(rank=2), "layer")
    fill_with_noise(handle)
    Handle(transposed).add_state(handle.state())
    x = torch.randn(3, 6)
    torch.testing.assert_close(transposed(x), linear(x))


# Refused --------------------------------------------------------------------------------------------


def refused(model: nn.Module, state: AdapterState, error: type[Exception], match: str) -> None:
    keys = list(model.state_dict())
    handle = Handle(model)
    with pytest.raises(error, match=match):
        handle.add_state(state)
    assert handle.names == []
    assert list(model.state_dict()) == keys


def test_layers_that_the_model_lacks_are_all_named_with_the_closest() -> None:
    model = nn.ModuleDict({"heads": nn.Linear(8, 13), "norm": nn.LayerNorm(8)})
    refused(model, state_of(), TargetError, r"(?s)3 problems.*'blocks\.0\.up'.*'head' that.*lacks\. Closest: 'heads'")


def test_layers_of_another_size_are_all_named() -> None:
    refused(Tower(width=10), state_of(), ShapeError, r"(?s)'blocks\.0\.up' is 20 x 10 here, but 16 x 8 in the adapter")


def test_a_layer_of_another_kind_is_named() -> None:
    state = lk.attach(OneLayer(nn.Embedding(6, 10)), lk.LoRA(rank=2), "layer").state()
    refused(OneLayer(nn.Linear(6, 10)), state, ShapeError, "'layer' is of kind linear here, but embedding")


def test_a_module_trained_in_full_of_another_size_is_named() -> None:
    model = Tower()
    model.norm = nn.LayerNorm(8, bias=False)
    refused(model, state_of(), ShapeError, "'norm': tensor 'bias' has no place here")


@pytest.mark.parametrize("method", METHODS)
def test_missing_and_left_over_tensors_are_named(method: str) -> None:
    state = state_of(method)
    site = state.sites["head"]
    missing, *_ = site.tensors
    tensors = {**{name: t for name, t in site.tensors.items() if name != missing}, "other": torch.zeros(2)}
    broken = {**state.sites, "head": dataclasses.replace(site, tensors=tensors)}
    match = rf"(?s)'head': the adapter has no tensor '{missing}'.*'head': tensor 'other' has no place here"
    refused(Tower(), dataclasses.replace(state, sites=broken), ShapeError, match)


def test_a_rank_other_than_the_methods_is_refused() -> None:
    state = state_of()
    method = lk.LoRA(rank=2, alpha=5)
    refused(Tower(), dataclasses.replace(state, method=method), ShapeError, r"tensor 'A' is \(3, 8\) in the adapter")
