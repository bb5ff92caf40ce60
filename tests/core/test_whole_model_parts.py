"""A soft prompt: a method without a layer keeps the same contract."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import AdapterError, MergeError, ShapeError, UnsupportedLayerError

from .models import SoftPrompt, Tower, fill_with_noise, tokens_for, train_some_steps


@pytest.fixture
def prompted() -> tuple[Tower, Handle, Tensor]:
    model = Tower().eval()
    return model, lk.attach(model, SoftPrompt(), name="prompt"), tokens_for()


def test_it_has_no_layer_and_counts_its_numbers(prompted: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = prompted
    assert handle.updates() == {}
    assert handle.counts().trained == 8
    assert list(handle.parameters()) == ["prompt.vector"]


def test_step_0_is_unchanged_and_training_moves_the_output_not_the_base(
    prompted: tuple[Tower, Handle, Tensor],
) -> None:
    model, handle, tokens = prompted
    before = handle.digest()
    out = model(tokens)
    with handle.disabled():
        assert torch.equal(model(tokens), out)
    train_some_steps(model, handle, tokens)
    assert not torch.equal(model(tokens), out)
    assert handle.digest() == before


def test_only_its_vector_gets_a_gradient(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, _, tokens = prompted
    model(tokens).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lorakit.prompt.prompt.vector"]


def test_it_is_saved_and_comes_back_bit_for_bit(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = prompted
    fill_with_noise(handle)
    out, state = model(tokens), handle.state()
    assert set(state.parts) == {"prompt"}
    handle.detach()
    again = Handle(model)
    again.add_state(state)
    assert torch.equal(model(tokens), out)
    assert torch.equal(again.state().parts["prompt"]["vector"], state.parts["prompt"]["vector"])


def test_a_saved_part_of_another_shape_is_refused_and_leaves_nothing(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, _ = prompted
    state = handle.state()
    handle.detach()
    keys = list(model.state_dict())
    state.parts["prompt"]["vector"] = torch.zeros(9)  # type: ignore[index]
    again = Handle(model)
    with pytest.raises(ShapeError, match=r"tensor 'vector' is \(9,\) in the adapter, \(8,\) here"):
        again.add_state(state)
    assert again.names == []
    assert list(model.state_dict()) == keys


def test_it_is_weighted_strengthened_and_added_to_others(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = prompted
    fill_with_noise(handle)
    vector = handle.parameters()["prompt.vector"].detach()
    handle.add("lora", lk.LoRA(rank=2), "up")
    fill_with_noise(handle, "lora")
    handle.strengthen("prompt", 0.5)
    handle.use({"prompt": 3.0, "lora": 1.0})
    both = model(tokens)
    handle.use("lora")
    with torch.no_grad():
        model.embed.weight.add_(1.5 * vector)  # what the prompt does, written into the base by hand
    torch.testing.assert_close(model(tokens), both)


def test_routing_and_merging_it_are_refused_by_name(prompted: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = prompted
    with pytest.raises(AdapterError, match="'prompt' act"), handle.routed(["prompt"] * 4):
        pass
    with pytest.raises(MergeError, match="'prompt' act"):
        handle.merge()


def test_it_does_not_act_on_rows_routed_to_others(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = prompted
    fill_with_noise(handle)
    with handle.disabled():
        base = model(tokens)
    with handle.routed([None] * 4):
        assert torch.equal(model(tokens), base)


def test_detaching_takes_its_hooks_and_its_child_away(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, _ = prompted
    assert len(model.embed._forward_hooks) == 1
    handle.detach()
    assert not model.embed._forward_hooks
    assert list(model.state_dict()) == list(Tower().state_dict())


def test_two_prompts_live_side_by_side_and_go_one_by_one(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = prompted
    fill_with_noise(handle)
    first = model(tokens)
    handle.add("other", SoftPrompt())
    fill_with_noise(handle)
    handle.remove("other")
    handle.use("prompt")
    assert torch.equal(model(tokens), first)


def test_a_copy_has_a_prompt_of_its_own(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = prompted
    fill_with_noise(handle)
    out = model(tokens)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = lk.handle_of(clone)
        assert other is not None
        fill_with_noise(other)
        assert not torch.equal(clone(tokens), out)
        other.detach()
        assert not clone.embed._forward_hooks
    assert torch.equal(model(tokens), out)


def test_it_is_one_graph(prompted: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = prompted
    fill_with_noise(handle)
    expected = model(tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), expected)


def test_a_sequential_root_is_refused_and_left_untouched() -> None:
    model = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 3))
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedLayerError, match="put it inside a module"):
        lk.attach(model, SoftPrompt())
    assert list(model.state_dict()) == keys
    assert len(model) == 2
    assert all(p.requires_grad for p in model.parameters())


def test_verify_finds_that_it_moves_the_output(prompted: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, tokens = prompted
    assert handle.verify(tokens).num_sites == 1
