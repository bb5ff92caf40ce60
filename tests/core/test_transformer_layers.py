"""Torch's own transformer layers: everything in them is adapted, and their fast path never passes an update by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.adapters.targets import find_sites

from .models import METHODS, WHOLE, fill_with_noise, method_named, pickled, train_some_steps

# torch's own, where it takes padding out of a batch
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
SUM_ORDER = 5e-5  # fp32 sums in another order, through two layers with norms
WIDTH, HEADS, INNER, ROWS, LENGTH = 8, 2, 12, 4, 5
PADDED = torch.arange(LENGTH) >= torch.tensor([5, 3, 4, 2])[:, None]
EVERYTHING = "self_attn,linear1,linear2"

FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "without biases": {"bias": False},
}
kinds = pytest.mark.parametrize("kind", FIELDS)


class Encodes(nn.Module):
    """An encoder of two layers; nested tensors are on wherever torch can use them."""

    def __init__(self, kind: str = "plain", layer: type[nn.Module] = nn.TransformerEncoderLayer) -> None:
        super().__init__()
        first = layer(WIDTH, HEADS, INNER, batch_first=True, **FIELDS[kind])
        self.encoder = nn.TransformerEncoder(first, 2, enable_nested_tensor=kind in ("plain", "gelu"))

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padded)


def adapted(model: nn.Module, method: str = "lora") -> Handle:
    handle = lk.attach(model.eval(), method_named(method), EVERYTHING, train_modules="norm1,norm2")
    fill_with_noise(handle)
    return handle


def calls() -> list[tuple[Tensor, ...]]:
    x = torch.randn(ROWS, LENGTH, WIDTH)
    return [(x,), (x, PADDED)]


def in_use(out: Tensor) -> Tensor:
    """Return an output's positions that are no padding: those torch fills with zeros on its fast path."""
    return out[~PADDED]


@kinds
@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_computes_the_same_with_gradients_without_and_merged(method: str, kind: str) -> None:
    model = Encodes(kind)
    handle = adapted(model, method)
    for call in calls():
        slow = model(*call).detach()
        with torch.no_grad():
            with handle.disabled():
                assert (in_use(model(*call)) - in_use(slow)).abs().max() > 100 * SUM_ORDER
            torch.testing.assert_close(in_use(model(*call)), in_use(slow), rtol=0, atol=SUM_ORDER)
            handle.merge()
            torch.testing.assert_close(in_use(model(*call)), in_use(slow), rtol=0, atol=SUM_ORDER)
            handle.unmerge()


@kinds
@torch.no_grad()
def test_its_fast_path_is_on_while_nothing_acts(kind: str) -> None:
    model = Encodes(kind).eval()
    inputs = calls()
    expected = [model(*call) for call in inputs]
    classes = [type(module) for module in model.modules()]
    handle = adapted(model)
    model(*inputs[1])
    with handle.disabled():
        assert all(torch.equal(model(*call), out) for call, out in zip(inputs, expected, strict=True))
    handle.merge()
    plain = Encodes(kind).eval()
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "lorakit" not in key})
    assert all(torch.equal(model(*call), plain(*call)) for call in inputs)
    handle.unmerge()
    handle.detach()
    assert all(torch.equal(model(*call), out) for call, out in zip(inputs, expected, strict=True))
    assert [type(module) for module in model.modules()] == classes


@torch.no_grad()
def test_an_encoders_fast_path_is_another_one_than_the_slow_one() -> None:
    model = Encodes().eval()  # else the test above would compare a path with itself
    x = calls()[1]
    fast = model(*x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = model(*x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert (fast[PADDED] == 0).all()
    assert not torch.equal(fast, slow)


@torch.no_grad()
def test_rows_are_routed_with_padding() -> None:
    model = Encodes()
    handle = adapted(model)
    x, padded = calls()[1]
    with handle.disabled():
        base = model(x, padded)
    own = model(x, padded)
    with handle.routed(["default", None, "default", None]):
        mixed = model(x, padded)
    expected = torch.where(torch.tensor([True, False, True, False])[:, None, None], own, base)
    torch.testing.assert_close(in_use(mixed), in_use(expected), rtol=0, atol=SUM_ORDER)


class Halves(nn.TransformerEncoderLayer):
    """A layer of one's own around torch's, whose forward it calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) / 2


@torch.no_grad()
def test_a_layer_whose_own_forward_calls_torchs_is_not_passed_by_either() -> None:
    model = Encodes(layer=Halves)
    handle = adapted(model)
    (x,) = calls()[0]
    with torch.enable_grad():
        slow = model(x).detach()
    torch.testing.assert_close(model(x), slow, rtol=0, atol=SUM_ORDER)
    assert handle.verify(x).num_sites == 12
    assert type(handle.detach().encoder.layers[0]) is Halves


@torch.no_grad()
@pytest.mark.parametrize("unhook_first", [True, False])
def test_a_layer_with_accelerates_hook_is_not_passed_by_either(unhook_first: bool) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = Encodes().eval()
    (x,) = calls()[0]
    base = model(x)
    for layer in model.encoder.layers:
        add_hook_to_module(layer, ModelHook())
    handle = adapted(model)
    with torch.enable_grad():
        slow = model(x).detach()
    assert (slow - base).abs().max() > 100 * SUM_ORDER
    torch.testing.assert_close(model(x), slow, rtol=0, atol=SUM_ORDER)
    for step in (0, 1):
        if (step == 0) == unhook_first:
            for layer in model.encoder.layers:
                remove_hook_from_module(layer)
        else:
            handle.detach()
    assert torch.equal(model(x), base)
    assert all(type(layer) is nn.TransformerEncoderLayer for layer in model.encoder.layers)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@torch.no_grad()
def test_a_copy_of_an_adapted_encoder_has_paths_of_its_own(way: Callable[[nn.Module], nn.Module]) -> None:
    model = Encodes()
    handle = adapted(model)
    call = calls()[1]
    with handle.disabled():
        base = model(*call)
    expected = model(*call)
    clone = way(model)
    other = lk.handle_of(clone)
    assert other is not None
    assert torch.equal(clone(*call), expected)
    handle.use(None)
    assert torch.equal(clone(*call), expected)
    assert torch.equal(model(*call), base)
    other.detach()
    assert torch.equal(clone(*call), base)
    assert type(clone.get_submodule("encoder.layers.1")) is nn.TransformerEncoderLayer


def test_an_adapted_encoder_is_one_graph() -> None:
    model = Encodes()
    handle = adapted(model)
    (x,) = calls()[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=SUM_ORDER)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=SUM_ORDER)
        with handle.disabled():
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=SUM_ORDER)


# Decoders and whole transformers --------------------------------------------------------------------


class Translates(nn.Module):
    """``nn.Transformer`` over tokens: an encoder, a decoder, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = nn.Transformer(WIDTH, HEADS, 2, 2, INNER, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.embed(tokens)
        return self.head(self.body(x, x, tgt_mask=hidden, tgt_is_causal=True))


def tokens() -> Tensor:
    return torch.randint(0, 11, (ROWS, LENGTH))


def paths(model: nn.Module, targets: str) -> list[str]:
    return [site.path for site in find_sites(model, targets)]


def test_the_words_mean_the_layers_of_a_transformer_of_torchs() -> None:
    model = Translates()
    attentions = [f"body.encoder.layers.{i}.self_attn" for i in (0, 1)]
    attentions += [f"body.decoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "multihead_attn")]
    inside = [f"{path}.{weight}" for path in attentions for weight in ("in_proj_weight", "out_proj")]
    plain = [f"body.{half}.layers.{i}.linear{j}" for half in ("encoder", "decoder") for i in (0, 1) for j in (1, 2)]
    assert sorted(paths(model, "attention")) == sorted(inside)
    assert sorted(paths(model, "mlp")) == sorted(plain)
    assert sorted(paths(model, "all-linear")) == sorted([*inside, *plain, "head"])


@pytest.mark.parametrize("method", WHOLE)
def test_a_whole_transformer_is_trained_merged_saved_and_routed(method: str) -> None:
    model, x = Translates().eval(), tokens()
    base = model(x)
    handle = lk.attach(model, method_named(method, rank=2), "all-linear,embed", train_modules="norm,norm1,norm2,norm3")
    torch.testing.assert_close(model(x), base, rtol=0, atol=SUM_ORDER)
    assert handle.verify(x).num_sites == len(handle.updates()) + len(handle.entry("default").copies) == 22 + 12
    before = handle.digest()
    train_some_steps(model, handle, x)
    assert handle.digest() == before
    with torch.no_grad():
        expected, state = model(x), handle.state()
        with handle.disabled():
            base = model(x)
        with handle.routed(["default", None, None, "default"]):
            mixed = model(x)
        torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]], rtol=0, atol=SUM_ORDER)
        torch.testing.assert_close(mixed[[1, 2]], base[[1, 2]], rtol=0, atol=SUM_ORDER)
        handle.merge()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=SUM_ORDER)
        handle.unmerge()
        assert torch.equal(model(x), expected)
        handle.detach()
        Handle(model).add_state(state)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_decoder_layer_attends_to_a_memory_of_its_own_length(norm_first: bool) -> None:
    class Decodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, norm_first=norm_first, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
            return self.layer(x, memory, memory_key_padding_mask=padded)

    model = Decodes().eval()
    handle = lk.attach(model, lk.DoRA(rank=2), "layer.*", exclude=r"re:.*\.(norm|dropout)\d?")
    fill_with_noise(handle)
    x, memory = torch.randn(ROWS, 3, WIDTH), torch.randn(ROWS, LENGTH, WIDTH)
    slow = model(x, memory, PADDED).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, memory, PADDED), slow, rtol=0, atol=SUM_ORDER)
        with handle.routed([None, "default", "default", None]):
            torch.testing.assert_close(model(x, memory, PADDED)[[1, 2]], slow[[1, 2]], rtol=0, atol=SUM_ORDER)
        handle.merge()
        torch.testing.assert_close(model(x, memory, PADDED), slow, rtol=0, atol=SUM_ORDER)


def test_all_biases_of_an_encoder_are_trained_and_merged() -> None:
    model = Encodes()
    handle = lk.attach(model.eval(), lk.LoRA(rank=2, bias="all"), "linear1")
    per_layer = {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"}
    assert set(handle.state().biases) == {f"encoder.layers.{i}.{name}" for i in (0, 1) for name in per_layer}
    call = calls()[1]
    model(*call).sum().backward()
    assert all(p.grad is not None for key, p in handle.parameters().items() if key.endswith("bias"))
    fill_with_noise(handle)
    with torch.no_grad():
        expected = model(*call)
        handle.merge()
        torch.testing.assert_close(in_use(model(*call)), in_use(expected), rtol=0, atol=SUM_ORDER)
    biases = {name for name, p in Encodes().named_parameters() if name.endswith("bias")}
    assert handle.merged is not None
    assert biases <= set(handle.merged.names)
