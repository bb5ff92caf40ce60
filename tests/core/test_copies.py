"""deepcopy, pickle and torch.save give models with adapters of their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.adapters.copies import pristine_copy
from lorakit.methods import find_method

from .models import Tower, fill_with_noise, tokens_for, train_some_steps

Build = Callable[..., nn.Module]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}
every_way = pytest.mark.parametrize("way", COPIES)


@pytest.fixture
def trained() -> tuple[Tower, Handle, Tensor]:
    model = Tower(tied=True).eval()
    handle = lk.attach(model, lk.DoRA(rank=2), "up", name="a", train_modules="embed,head,norm")
    fill_with_noise(handle, "a")
    handle.add("b", lk.LoRA(rank=2, bias="all"), "down")
    fill_with_noise(handle, "b")
    handle.use({"a": 1.0, "b": 0.5})
    return model, handle, tokens_for()


def handle_on(model: nn.Module) -> Handle:
    handle = lk.handle_of(model)
    assert handle is not None
    assert handle.model is model
    return handle


@every_way
def test_a_copy_computes_the_same(trained: tuple[Tower, Handle, Tensor], way: str) -> None:
    model, _, tokens = trained
    clone = COPIES[way](model)
    assert torch.equal(clone(tokens), model(tokens))
    assert list(clone.state_dict()) == list(model.state_dict())
    assert type(clone.head) is type(model.head)


@every_way
def test_training_a_copy_leaves_the_original(trained: tuple[Tower, Handle, Tensor], way: str) -> None:
    model, handle, tokens = trained
    out, digest = model(tokens), handle.digest()
    clone = COPIES[way](model)
    handle_on(clone).use("a")
    train_some_steps(clone, handle_on(clone), tokens, "a")
    assert handle.active.weights == {"a": 1.0, "b": 0.5}
    assert torch.equal(model(tokens), out)
    assert not torch.equal(clone(tokens), out)
    assert handle_on(clone).digest() == digest


@every_way
def test_a_copy_can_be_detached_by_itself(trained: tuple[Tower, Handle, Tensor], way: str) -> None:
    model, handle, tokens = trained
    out = model(tokens)
    clone = COPIES[way](model)
    handle_on(clone).detach()
    with handle.disabled():
        assert torch.equal(clone(tokens), model(tokens))
    assert type(clone.head) is nn.Linear
    assert clone.head.weight is clone.embed.weight
    assert torch.equal(model(tokens), out)


@every_way
def test_a_merged_copy_can_be_unmerged(trained: tuple[Tower, Handle, Tensor], way: str) -> None:
    model, handle, tokens = trained
    handle.use("a")
    out, digest = model(tokens), handle.digest()
    handle.merge()
    clone = COPIES[way](model)
    assert torch.equal(clone(tokens), model(tokens))
    handle_on(clone).unmerge()
    assert handle_on(clone).digest() == digest
    assert torch.equal(clone(tokens), out)
    assert clone.head.weight is clone.embed.weight
    assert handle.merged is not None


@every_way
def test_a_copy_of_a_transformers_model_works(build: Build, tokens: Tensor, way: str) -> None:
    model = build("llama")
    fill_with_noise(lk.attach(model, lk.LoRA(rank=2)))
    clone = COPIES[way](model)
    assert torch.equal(clone(tokens).logits, model(tokens).logits)
    assert handle_on(clone).detach() is clone


def test_a_copy_of_a_copy_works(trained: tuple[Tower, Handle, Tensor]) -> None:
    model, _, tokens = trained
    clone = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model))))
    assert torch.equal(clone(tokens), model(tokens))


def test_a_layer_compiled_in_place_can_be_copied(trained: tuple[Tower, Handle, Tensor]) -> None:
    model, _, tokens = trained
    out = model(tokens)
    model.head.compile(backend="eager")
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), out)


def test_an_adapter_moves_with_its_model_to_another_dtype(trained: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = trained
    model.to(torch.float64)
    assert {p.dtype for p in handle.parameters("b").values()} == {torch.float64}
    assert model(tokens).dtype == torch.float64


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_trained_embedding_is_copied_without_the_model_around_it(kind: str) -> None:
    config: Any = (
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        if kind == "llama"
        else T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    made: Any = (LlamaForCausalLM if kind == "llama" else T5ForConditionalGeneration)(config)
    lk.attach(made, find_method("full"))
    embedding = made.get_input_embeddings()
    assert not [hook for hook in pristine_copy(embedding)._forward_hooks.values() if hasattr(hook, "__self__")]
    assert [hook for hook in embedding._forward_hooks.values() if hasattr(hook, "__self__")]
