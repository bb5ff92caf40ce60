"""Merging is the only thing that puts other numbers into the base, and unmerging restores every bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import AdapterError, MergeError

from .models import OneLayer, Tower, fill_with_noise, tokens_for

Build = Callable[..., nn.Module]
SUM_ORDER = 5e-5  # fp32 sums in another order through three layers, values of order 1 to 10


@pytest.fixture
def pair() -> tuple[Tower, Handle, Tensor]:
    model = Tower().eval()
    handle = lk.attach(model, lk.LoRA(rank=3, alpha=5, bias="lora_only"), "all-linear,embed", name="a")
    fill_with_noise(handle, "a")
    handle.add("b", lk.DoRA(rank=2, alpha=3), "up,embed", train_modules="head,norm")
    fill_with_noise(handle, "b")
    return model, handle, tokens_for()


@pytest.mark.parametrize("which", ["a", "b", ["a", "b"], {"a": 0.5}, {"a": -0.7, "b": 1.3}])
def test_merged_equals_unmerged_per_adapter_and_weighted(pair: tuple[Tower, Handle, Tensor], which: object) -> None:
    model, handle, tokens = pair
    before = handle.digest()
    handle.use(which)
    unmerged = model(tokens)
    handle.use(None)
    merged = handle.merge(which)
    torch.testing.assert_close(model(tokens), unmerged, rtol=0, atol=SUM_ORDER)
    assert set(merged.weights) == (set(which) if not isinstance(which, str) else {which})
    handle.unmerge()
    assert handle.digest() == before
    assert torch.equal(model(tokens), unmerged)


def test_a_merge_without_a_choice_takes_what_acts(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use({"a": 0.5})
    out = model(tokens)
    assert handle.merge().weights == {"a": 0.5}
    torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)


def test_a_merge_lists_the_tensors_that_changed(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, _ = pair
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lorakit" not in name}
    merged = handle.merge("b")
    changed = [name for name, old in before.items() if not torch.equal(model.state_dict()[name], old)]
    assert merged.names == changed
    assert merged.untied == []
    assert handle.merged is merged


def test_merging_leaves_the_keys_of_the_base(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, _ = pair
    before = list(model.state_dict())
    handle.merge("a")
    assert list(model.state_dict()) == before


def test_baking_gives_a_plain_model_with_the_merged_weights(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    keys = list(Tower().state_dict())
    handle.use("b")
    out = model(tokens)
    handle.merge()
    assert handle.bake() is model
    assert list(model.state_dict()) == keys
    assert type(model.head) is nn.Linear
    assert lk.handle_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)
    plain = Tower().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens), model(tokens))


# Keeping nothing ------------------------------------------------------------------------------------


def test_keeping_nothing_merges_the_same_and_refuses_to_unmerge(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.merge("a")
    kept = model(tokens)
    handle.unmerge()
    handle.merge("a", keep="none")
    assert torch.equal(model(tokens), kept)
    with pytest.raises(MergeError, match="the original weights were not kept"):
        handle.unmerge()
    assert torch.equal(model(tokens), kept)


def test_keeping_nothing_writes_into_the_weights_that_are_there(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, _ = pair
    weight = model.head.weight
    handle.merge("a", keep="none")
    assert model.head.weight is weight


@pytest.mark.parametrize("keep", ["memory", "none"])
def test_a_merge_that_fails_midway_changes_nothing(keep: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).half()
    handle = lk.attach(model, lk.LoRA(rank=2))
    fill_with_noise(handle)
    with torch.no_grad():
        handle.parameters()["1.A"].fill_(6e4)
        handle.parameters()["1.B"].fill_(6e4)
    before = handle.digest()
    with pytest.raises(MergeError, match=r"'1' gives values that torch\.float16 cannot hold"):
        handle.merge(keep=keep)
    assert handle.merged is None
    assert handle.digest() == before
    assert handle.active.weights == {"default": 1.0}


def test_an_unknown_way_of_keeping_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    with pytest.raises(MergeError, match="keep='disk'"):
        pair[1].merge("a", keep="disk")


# Refused --------------------------------------------------------------------------------------------

WHILE_MERGED: dict[str, Callable[[Handle], object]] = {
    "merge": lambda handle: handle.merge("b"),
    "use": lambda handle: handle.use("b"),
    "using": lambda handle: handle.using("b").__enter__(),
    "disabled": lambda handle: handle.disabled().__enter__(),
    "strengthen": lambda handle: handle.strengthen("a", 2.0),
    "routed": lambda handle: handle.routed(["a"]).__enter__(),
    "add": lambda handle: handle.add("c", "lora"),
    "remove": lambda handle: handle.remove("b"),
    "detach": lambda handle: handle.detach(),
    "delta": lambda handle: handle.delta("head", "a"),
    "state": lambda handle: handle.state("a"),
    "digest": lambda handle: handle.digest(),
    "verify": lambda handle: handle.verify(tokens_for()),
}


@pytest.mark.parametrize("what", WHILE_MERGED)
def test_what_would_not_have_its_effect_is_refused_while_merged(pair: tuple[Tower, Handle, Tensor], what: str) -> None:
    model, handle, tokens = pair
    before = handle.digest()
    handle.merge("a")
    out = model(tokens)
    with pytest.raises(MergeError, match=r"merged now|merged: the base's weights are replaced now"):
        WHILE_MERGED[what](handle)
    assert torch.equal(model(tokens), out)
    handle.unmerge()
    assert handle.digest() == before
    assert handle.names == ["a", "b"]


def test_unmerging_or_baking_what_is_not_merged_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    with pytest.raises(MergeError, match="nothing is merged"):
        handle.unmerge()
    with pytest.raises(MergeError, match="nothing is merged"):
        handle.bake()


@pytest.mark.parametrize("which", [None, {"a": 0.0}])
def test_merging_nothing_is_refused(pair: tuple[Tower, Handle, Tensor], which: object) -> None:
    _, handle, _ = pair
    handle.use(None)
    with pytest.raises(MergeError, match="nothing to merge"):
        handle.merge(which)
    assert handle.active.weights == {}


def test_merging_an_unknown_adapter_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        handle.merge("c")
    assert handle.merged is None


def test_a_computed_weight_is_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    model = OneLayer(layer)
    x = torch.randn(2, 4)
    handle = lk.attach(model, lk.LoRA(rank=2), "layer")
    fill_with_noise(handle)
    out = model(x)
    with pytest.raises(MergeError, match="computes its weight"):
        handle.merge()
    assert torch.equal(model(x), out)


class Snake(nn.Module):
    """An activation with a trained parameter in which it is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x) / self.alpha


@pytest.mark.parametrize("module", [Snake(), nn.BatchNorm1d(6)], ids=["snake", "batch norm"])
def test_what_is_not_linear_in_its_weights_merges_alone_at_strength_1_only(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 6), module).eval()
    x = torch.randn(5, 4)
    handle = lk.attach(model, lk.LoRA(rank=2), "0", train_modules="1")
    fill_with_noise(handle)
    with pytest.raises(MergeError, match="merge 'default' alone, at strength 1"):
        handle.merge({"default": 0.5})
    out = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), out, rtol=0, atol=SUM_ORDER)


# Tied weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["memory", "none"])
def test_a_merge_into_a_tied_head_leaves_the_embedding(build: Build, tokens: Tensor, keep: str) -> None:
    model = build("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    assert model.lm_head.weight is weight
    original = weight.detach().clone()
    handle = lk.attach(model, lk.LoRA(rank=2), "lm_head")
    fill_with_noise(handle)
    out = model(tokens).logits
    merged = handle.merge(keep=keep)
    assert merged.untied == ["lm_head.weight"]
    assert embedding.weight is weight
    assert torch.equal(weight, original)
    assert model.lm_head.weight is not weight
    torch.testing.assert_close(model(tokens).logits, out, rtol=0, atol=SUM_ORDER)


def test_unmerging_ties_the_same_tensor_again(build: Build, tokens: Tensor) -> None:
    model = build("llama", tie_word_embeddings=True)
    weight = model.get_input_embeddings().weight
    handle = lk.attach(model, lk.LoRA(rank=2), "lm_head,embed_tokens")
    fill_with_noise(handle)
    before, out = handle.digest(), model(tokens).logits
    handle.merge()
    torch.testing.assert_close(model(tokens).logits, out, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    assert model.lm_head.weight is model.get_input_embeddings().weight is weight
    assert handle.digest() == before
    assert torch.equal(model(tokens).logits, out)


def test_baking_an_untied_head_gives_its_flag_back(build: Build) -> None:
    model = build("llama", tie_word_embeddings=True)
    handle = lk.attach(model, lk.LoRA(rank=2), "lm_head")
    handle.merge()
    handle.bake()
    assert all(p.requires_grad for p in model.parameters())
