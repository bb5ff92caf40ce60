"""Attaching, adding, removing and detaching: the model is exactly as before, also where an attach fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import AdapterError, LorakitError

from .models import METHODS, Tower, fill_with_noise, method_named, tokens_for

Build = Callable[..., nn.Module]


class WithNorm(nn.Module):
    """A convolution, a batch norm and a head: what a small vision model is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


def hook(module: nn.Module, args: object, out: object) -> None:
    """Do nothing, and be there."""


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that attaching could change, by module path, with the tensors by identity."""
    seen: dict[str, Any] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules():
        seen[path] = {
            "object": id(module),
            "class": type(module),
            "attributes": list(module.__dict__),
            "training": module.training,
            "hooks": list(module._forward_hooks.values()) + list(module._forward_pre_hooks.values()),
            "children": [name for name, _ in module.named_children()],
            "tensors": [(name, id(p), p.requires_grad) for name, p in module.named_parameters(recurse=False)],
            "buffers": [(name, id(b)) for name, b in module.named_buffers(recurse=False)],
        }
    return seen


def tower() -> nn.Module:
    model = Tower(tied=True)
    model.blocks[0].up.weight.requires_grad_(False)  # flags of both kinds
    model.norm.register_forward_hook(hook)
    return model


MODELS: dict[str, Callable[[Build], nn.Module]] = {
    "tower": lambda build: tower(),
    "batch norm in training": lambda build: WithNorm().train(),
    "batch norm in evaluation": lambda build: WithNorm().eval(),
    "llama": lambda build: build("llama", tie_word_embeddings=True),
    "gpt2": lambda build: build("gpt2"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_detaching_leaves_the_model_exactly_as_before(build: Build, method: str, name: str) -> None:
    model = MODELS[name](build)
    before = snapshot(model)
    handle = lk.attach(model, method_named(method))
    handle.add("second", method_named(method), train_modules="norm" if "norm" in dict(model.named_children()) else ())
    assert snapshot(model) != before
    assert handle.detach() is model
    assert snapshot(model) == before
    assert lk.handle_of(model) is None


def test_every_key_of_the_base_stays_in_the_state_in_its_order() -> None:
    model = Tower()
    before = list(model.state_dict())
    lk.attach(model, lk.LoRA(rank=2), train_modules="head,norm", targets="up,embed")
    after = list(model.state_dict())
    assert [key for key in after if "lorakit" not in key] == before
    assert len(after) > len(before)


def test_the_host_is_the_same_object_and_still_of_its_class() -> None:
    model = Tower()
    layer = model.head
    lk.attach(model, lk.LoRA(rank=2), "head")
    assert model.head is layer
    assert isinstance(layer, nn.Linear)
    assert isinstance(model, Tower)


def test_two_layers_of_a_kind_share_their_class() -> None:
    model = Tower()
    lk.attach(model, lk.LoRA(rank=2))
    assert type(model.blocks[0].up) is type(model.head)


def test_the_base_is_frozen_while_attached() -> None:
    model = Tower()
    handle = lk.attach(model, lk.LoRA(rank=2))
    trained = {id(p) for p in handle.parameters().values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


# Failing --------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "target": {"targets": "nothing"},
    "rank": {"method": lk.LoRA(rank=99)},
    "kind": {"targets": "norm"},
    "pattern": {"method": lk.LoRA(rank_pattern={"x": 2})},
    "method": {"method": "lroa"},
    "full": {"train_modules": "nothing"},
    "tied": {"train_modules": "head", "targets": "up"},
    "bias": {"method": lk.LoRA(rank=2, bias="lora_only"), "targets": "head"},
    "name": {"name": "with.dot"},
    "empty name": {"name": ""},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_failed_attach_leaves_the_model_untouched(wrong: str) -> None:
    model = tower()
    before = snapshot(model)
    with pytest.raises(LorakitError):
        lk.attach(model, **{"method": lk.LoRA(rank=2), **WRONG[wrong]})
    assert snapshot(model) == before
    assert lk.handle_of(model) is None


def break_the_last(model: Tower) -> None:
    """Make the last target refuse, after others have been changed."""
    model.head.forward = lambda x: x @ model.head.weight.t()


def test_an_attach_that_fails_midway_leaves_the_model_untouched() -> None:
    model = tower()
    break_the_last(model)
    before = snapshot(model)
    with pytest.raises(LorakitError, match="'head' has a forward set on the instance"):
        lk.attach(model, lk.LoRA(rank=2))
    assert snapshot(model) == before


def test_an_add_that_fails_midway_leaves_the_other_adapters_alone() -> None:
    model = tower()
    tokens = tokens_for()
    handle = lk.attach(model, lk.LoRA(rank=2), "up", name="first")
    fill_with_noise(handle)
    break_the_last(model)
    before, out = snapshot(model), model(tokens)
    with pytest.raises(LorakitError, match="'head'"):
        handle.add("second", lk.LoRA(rank=2))
    assert snapshot(model) == before
    assert handle.names == ["first"]
    assert torch.equal(model(tokens), out)


def test_a_name_that_is_taken_is_refused() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2))
    with pytest.raises(AdapterError, match="'default' is attached already"):
        lk.attach(handle.model, lk.LoRA(rank=2))


# Names ----------------------------------------------------------------------------------------------

AWKWARD = ["train", "lora", "weight", "forward", "lorakit", "active", "ops", "0", "a name with spaces", "ä-_/"]


@pytest.mark.parametrize("name", AWKWARD)
def test_an_adapter_may_have_this_name(name: str) -> None:
    model, tokens = Tower().eval(), tokens_for()
    base = model(tokens)
    handle = lk.attach(model, lk.LoRA(rank=2), name=name, train_modules="norm")
    fill_with_noise(handle)
    trained = model(tokens)
    assert not torch.equal(trained, base)
    other = Handle(Tower().eval())
    other.model.load_state_dict({k: v for k, v in model.state_dict().items() if ".lorakit." not in k})
    other.add_state(handle.state(), name)
    assert torch.equal(other.model(tokens), trained)
    handle.detach()
    assert torch.equal(model(tokens), base)


def test_all_awkward_names_live_side_by_side() -> None:
    model, tokens = Tower().eval(), tokens_for()
    handle = Handle(model)
    for name in AWKWARD:
        handle.add(name, lk.LoRA(rank=2))
        fill_with_noise(handle, name)
    outs = []
    for name in AWKWARD:
        handle.use(name)
        outs.append(model(tokens))
    assert len({out.sum().item() for out in outs}) == len(AWKWARD)
    assert handle.names == AWKWARD


def test_an_unknown_name_is_named_with_the_closest() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2), name="french")
    with pytest.raises(AdapterError, match=r"no adapter 'frensh'\. Closest: 'french'"):
        handle.use("frensh")
    with pytest.raises(AdapterError, match="2 problems"):
        handle.use(["frensh", "germn"])


def test_a_method_call_that_could_mean_several_adapters_asks_which() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2), name="a")
    handle.add("b", lk.LoRA(rank=2))
    handle.use(["a", "b"])
    with pytest.raises(AdapterError, match="say which adapter: a, b"):
        handle.counts()


def test_removing_one_adapter_leaves_the_others() -> None:
    model, tokens = Tower().eval(), tokens_for()
    handle = lk.attach(model, lk.LoRA(rank=2), "up", name="a")
    fill_with_noise(handle)
    out = model(tokens)
    handle.add("b", lk.LoRA(rank=2), "up,head")
    handle.remove("b")
    assert type(model.head) is nn.Linear
    handle.use("a")
    assert torch.equal(model(tokens), out)


def test_attaching_again_adds_to_the_same_handle() -> None:
    model = Tower()
    first = lk.attach(model, lk.LoRA(rank=2), name="a")
    assert lk.attach(model, lk.LoRA(rank=2), name="b") is first
    assert first.names == ["a", "b"]


# Statistics -----------------------------------------------------------------------------------------


def statistics(model: WithNorm) -> list[torch.Tensor]:
    return [b.clone() for b in (model.norm.running_mean, model.norm.running_var, model.norm.num_batches_tracked)]


def test_training_leaves_the_running_statistics_of_a_batch_norm() -> None:
    model = WithNorm().train()
    before = statistics(model)
    lk.attach(model, lk.LoRA(rank=2))
    model.train()
    model(torch.randn(6, 3, 8, 8)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))


@pytest.mark.parametrize("selection", ["default", None, {"default": 0.5}])
def test_a_batch_norm_trained_in_full_has_statistics_of_its_own(selection: object) -> None:
    model = WithNorm().train()
    before = statistics(model)
    handle = lk.attach(model, lk.LoRA(rank=2), "head", train_modules="norm")
    handle.use(selection)
    model.train()
    model(torch.randn(6, 3, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    moved = handle.state("default").modules["norm"]["running_mean"].abs().sum() > 0
    assert moved == (selection is not None)
    handle.detach()
    assert type(model.norm) is nn.BatchNorm2d
    assert model.norm.training
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))


def test_a_batch_norm_of_which_only_the_bias_is_trained_keeps_the_bases_statistics() -> None:
    model = WithNorm().train()
    handle = lk.attach(model, lk.LoRA(rank=2, bias="all"), "head")
    model.train()
    x = torch.randn(6, 3, 8, 8)
    model(x).sum().backward()
    trained = model(x)
    assert torch.equal(model.eval()(x), trained)
    assert set(handle.state().biases) == {"conv", "norm", "head"}


def test_a_batch_norm_follows_the_models_mode_once_detached() -> None:
    model = WithNorm().train()
    handle = lk.attach(model, lk.LoRA(rank=2))
    model.eval()
    handle.detach()
    assert not model.norm.training
