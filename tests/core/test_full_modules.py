"""Modules trained in full, and biases: the adapter's own copies, never the base's tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ConfigError, RoutingError, TargetError, UnsupportedLayerError

from .models import OneLayer, Tower, fill_with_noise, tokens_for, train_some_steps

Build = Callable[..., nn.Module]
SUM_ORDER = 5e-5  # fp32 sums in another order, values of order 1 to 10

# What is trained in full, and the modules that hold its parameters.
FULL = {
    "a head": ("head", ["head"]),
    "an embedding": ("embed", ["embed"]),
    "a norm": ("norm", ["norm"]),
    "a container": ("blocks.1", ["blocks.1.up", "blocks.1.down"]),
    "several": (["norm", "head"], ["norm", "head"]),
}


def attached(full: object, tied: bool = False) -> tuple[Tower, Handle, Tensor]:
    model = Tower(tied=tied).eval()
    return model, lk.attach(model, lk.LoRA(rank=2), "blocks.0.up", train_modules=full), tokens_for()


@pytest.mark.parametrize("what", FULL)
def test_step_0_is_the_base_bit_for_bit(what: str) -> None:
    model, handle, tokens = attached(FULL[what][0])
    out = model(tokens)
    handle.detach()
    assert torch.equal(out, model(tokens))


@pytest.mark.parametrize("what", FULL)
def test_the_copy_trains_and_the_base_stays(what: str) -> None:
    model, handle, tokens = attached(FULL[what][0])
    before, start = handle.digest(), {key: p.clone() for key, p in handle.parameters().items()}
    train_some_steps(model, handle, tokens)
    assert handle.digest() == before
    assert handle.counts().full == sum(
        p.numel() for path in FULL[what][1] for p in Tower().get_submodule(path).parameters()
    )
    assert all(not torch.equal(p, start[key]) for key, p in handle.parameters().items())


@pytest.mark.parametrize("what", FULL)
def test_copies_switch_with_their_adapters(what: str) -> None:
    model, handle, tokens = attached(FULL[what][0])
    with handle.disabled():
        base = model(tokens)
    fill_with_noise(handle)
    first = model(tokens)
    handle.add("second", lk.LoRA(rank=2), "blocks.0.up", train_modules=FULL[what][0])
    assert torch.equal(model(tokens), base)  # a copy of the base, not of the first adapter's
    fill_with_noise(handle, "second")
    assert not torch.equal(model(tokens), first)
    handle.use("default")
    assert torch.equal(model(tokens), first)
    handle.use(None)
    assert torch.equal(model(tokens), base)


@pytest.mark.parametrize("what", FULL)
def test_copies_are_routed_by_row(what: str) -> None:
    model, handle, tokens = attached(FULL[what][0])
    fill_with_noise(handle)
    handle.add("second", lk.LoRA(rank=2), "blocks.0.up", train_modules=FULL[what][0])
    fill_with_noise(handle, "second")
    route = [None, "default", "second", "default"]
    with handle.routed(route):
        mixed = model(tokens)
    for row, name in enumerate(route):
        with handle.using(name):
            torch.testing.assert_close(mixed[row], model(tokens)[row], rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("what", FULL)
@pytest.mark.parametrize("which", ["default", {"default": 0.4}, {"default": 0.4, "second": 0.6}])
def test_copies_merge_and_unmerge(what: str, which: object) -> None:
    model, handle, tokens = attached(FULL[what][0])
    fill_with_noise(handle)
    handle.add("second", lk.LoRA(rank=2), "all-linear", train_modules="norm")
    fill_with_noise(handle, "second")
    before = handle.digest()
    handle.use(which)
    out = model(tokens)
    handle.merge()
    torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    assert handle.digest() == before


@pytest.mark.parametrize("what", FULL)
def test_copies_are_saved_and_come_back_bit_for_bit(what: str) -> None:
    model, handle, tokens = attached(FULL[what][0])
    fill_with_noise(handle)
    out, state = model(tokens), handle.state()
    assert list(state.modules) == FULL[what][1]
    handle.detach()
    again = Handle(model)
    again.add_state(state)
    assert torch.equal(model(tokens), out)
    assert again.entry("default").full_modules == state.full_modules


def test_a_merged_copy_is_the_copy_rounded(build: Build) -> None:
    model = Tower().to(torch.bfloat16).eval()
    handle = lk.attach(model, lk.LoRA(rank=2), "up", train_modules="embed,head,norm")
    fill_with_noise(handle)
    copies, tokens = handle.state().modules, tokens_for()
    out = model(tokens)
    assert out.dtype == torch.bfloat16
    handle.merge()
    for path, tensors in copies.items():
        for name, tensor in tensors.items():
            assert torch.equal(model.get_submodule(path).get_parameter(name), tensor.to(torch.bfloat16))
    # Both round the same copies to bf16; only the updates of 'up' differ by their rounding (eps 2^-8).
    torch.testing.assert_close(model(tokens).float(), out.float(), rtol=0, atol=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_copies_train_on_a_base_of_half_precision(dtype: torch.dtype) -> None:
    model = Tower().to(dtype)
    handle = lk.attach(model, lk.LoRA(rank=2), "up", train_modules="embed,head,norm")
    out = model(tokens_for())
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters().values())


def test_the_identity_of_the_base_leaves_out_what_is_trained_in_full() -> None:
    _, handle, _ = attached("head")
    assert handle.identity().excluded == ("head",)
    assert handle.identity().num_tensors == len(list(Tower().parameters())) - 1


# Real heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_the_word_head_trains_a_classifiers_head(build: Build, tokens: Tensor, name: str) -> None:
    model = build(name)
    handle = lk.attach(model, lk.LoRA(rank=2), "attention", train_modules="head")
    holders = {
        "bert": ["classifier"],
        "roberta": ["classifier.dense", "classifier.out_proj"],
        "distilbert": ["classifier", "pre_classifier"],
    }
    assert list(handle.state().modules) == holders[name]
    before = handle.digest()
    labels = torch.zeros(4, dtype=torch.long)
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert handle.digest() == before


def test_a_module_called_head_is_meant_where_a_model_says_of_no_head() -> None:
    assert list(attached("head")[1].state().modules) == ["head"]


def test_the_target_words_leave_out_what_is_trained_in_full(build: Build) -> None:
    handle = lk.attach(build("bert"), lk.LoRA(rank=2), train_modules="pooler")
    assert not any("pooler" in path for path in handle.updates())


# Tied -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("head", "embed"), ("embed", "head")])
def test_one_of_two_tied_modules_is_refused_naming_the_other(one: str, other: str) -> None:
    with pytest.raises(TargetError, match=rf"'{one}\.weight' is tied to '{other}\.weight'.*Name both"):
        attached(one, tied=True)


def test_both_tied_modules_train_one_tensor() -> None:
    model, handle, tokens = attached("embed,head", tied=True)
    assert handle.counts().full == 13 * 8
    train_some_steps(model, handle, tokens)
    modules = handle.state().modules
    assert torch.equal(modules["embed"]["weight"], modules["head"]["weight"])
    weight = model.embed.weight
    out = model(tokens)
    handle.merge()
    torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    assert model.embed.weight is model.head.weight is weight


def test_tied_copies_stay_tied_when_they_come_back() -> None:
    model, handle, tokens = attached("embed,head", tied=True)
    fill_with_noise(handle)
    out, state = model(tokens), handle.state()
    handle.detach()
    again = Handle(model)
    again.add_state(state, trainable=True)
    assert torch.equal(model(tokens), out)
    assert again.counts().full == 13 * 8


def test_a_tied_llama_trains_both_in_full(build: Build, tokens: Tensor) -> None:
    model = build("llama", tie_word_embeddings=True)
    handle = lk.attach(model, lk.LoRA(rank=2), train_modules="lm_head,embed_tokens")
    assert handle.counts().full == 40 * 16
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in handle.parameters().values())


# Biases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("lora_only", {"blocks.0.up", "blocks.1.up"}),
        ("all", {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "norm"}),
    ],
)
def test_biases_are_copies_that_train_switch_merge_and_are_saved(bias: str, trained: set[str]) -> None:
    model, tokens = Tower().eval(), tokens_for()
    base = model(tokens)
    handle = lk.attach(model, lk.LoRA(rank=2, bias=bias), "up")
    assert torch.equal(model(tokens), base)
    before = handle.digest()
    train_some_steps(model, handle, tokens)
    assert handle.digest() == before
    out, state = model(tokens), handle.state()
    assert set(state.biases) == trained
    own = {path: model.get_submodule(path).get_parameter("bias") for path in trained}
    assert all(not torch.equal(state.biases[path], own[path]) for path in trained)
    with handle.routed(["default", None, "default", None]):
        mixed = model(tokens)
    assert torch.equal(mixed[[1, 3]], base[[1, 3]])
    torch.testing.assert_close(mixed[[0, 2]], out[[0, 2]], rtol=0, atol=SUM_ORDER)
    handle.merge({"default": 0.5})
    handle.unmerge()
    handle.merge("default")
    torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)
    for path, bias_before in own.items():  # b + (own - b) is own but for the rounding of the sum
        merged = model.get_submodule(path).get_parameter("bias")
        assert merged is not bias_before
        torch.testing.assert_close(merged.detach(), state.biases[path])
    handle.unmerge()
    assert handle.digest() == before
    handle.detach()
    again = Handle(model)
    again.add_state(state)
    assert torch.equal(model(tokens), out)


def test_biases_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="none of the targets has a bias"):
        lk.attach(Tower(), lk.LoRA(rank=2, bias="lora_only"), "head")
    with pytest.raises(ConfigError, match="this model has no biases"):
        lk.attach(OneLayer(nn.Linear(4, 6, bias=False)), lk.LoRA(rank=2, bias="all"), "layer")


class Filter(nn.Module):
    """A layer of one's own whose bias is not simply added to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.bias) @ self.kernel


def test_biases_that_are_not_simply_added_are_refused_by_name() -> None:
    model = nn.ModuleDict({"filter": Filter(), "fc": nn.Linear(4, 6)})
    with pytest.raises(UnsupportedLayerError, match=r"'filter' \(Filter: bias\)"):
        lk.attach(model, lk.LoRA(rank=2, bias="all"), "fc")


def test_all_biases_beside_some_rows_of_a_projection_are_refused_by_name() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(4, 6)})
    with pytest.raises(UnsupportedLayerError, match=r"'attn\.in_proj_weight' \(of which only some rows are targets\)"):
        lk.attach(model, lk.LoRA(rank=2, bias="all"), "attn[q,v]")
    handle = lk.attach(model, lk.LoRA(rank=2, bias="all"), "attn[q,k,v]")
    parts = {f"attn.in_proj_weight[{part}]" for part in "qkv"}
    assert set(handle.state().biases) == {*parts, "attn.out_proj", "fc"}


class Split(nn.Module):
    """A layer of one's own with two outputs, or with a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> object:
        return (self.gain * x, x) if gate is None else self.gain * x * gate


class AroundSplit(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.fc, self.split, self.gated = nn.Linear(6, 6), Split(), gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.split(x, x) if self.gated else self.split(x)[0]


@pytest.mark.parametrize("gated", [True, False], ids=["two inputs", "two outputs"])
def test_a_copy_of_other_than_one_input_and_output_acts_alone_but_is_not_routed(gated: bool) -> None:
    model, x = AroundSplit(gated).eval(), torch.randn(2, 6)
    base = model(x)
    handle = lk.attach(model, lk.LoRA(rank=2), "fc", train_modules="split")
    torch.testing.assert_close(model(x), base, rtol=0, atol=SUM_ORDER)
    with pytest.raises(RoutingError, match=r"trains a Split in full.*can act alone"), handle.routed(["default", None]):
        model(x)
    if not gated:
        handle.use({"default": 0.5})
        with pytest.raises(RoutingError, match=r"trains a Split in full.*can act alone"):
            model(x)
