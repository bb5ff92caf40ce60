"""Embeddings: scaled ones of every installed class, padding, tied tables, and those that compute otherwise."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ShapeError, UnsupportedLayerError
from lorakit.layers import Site, find_ops

from .models import WHOLE, OneLayer, Tower, fill_with_noise, method_named, tokens_for

Build = Callable[..., nn.Module]
SUM_ORDER = 2e-5  # fp32 sums in another order, values of order 1 to 10
VOCABULARY, WIDTH, SCALE, PADDING = 11, 6, 2.5, 3


def installed_classes() -> dict[str, str]:
    """Return the module of every class of transformers that is an embedding and says that it scales."""
    models = Path(transformers.__file__).parent / "models"
    return {
        name: f"transformers.models.{file.parent.name}.{file.stem}"
        for file in sorted(models.glob("*/modeling_*.py"))
        for name in re.findall(r"^class (\w*Scaled\w*)\(nn\.Embedding\)", file.read_text("utf-8"), re.MULTILINE)
    }


CLASSES = installed_classes()
OTHERWISE = "T5Gemma2TextScaledWordEmbedding"  # one of its tokens has a vector of its own beside the table


def scaled(name: str) -> nn.Embedding:
    kind = getattr(importlib.import_module(CLASSES[name]), name)
    layer: nn.Embedding = kind(VOCABULARY, WIDTH, PADDING, embed_scale=SCALE)
    nn.init.normal_(layer.weight)
    return layer


def every_token() -> Tensor:
    return torch.arange(2 * VOCABULARY).view(2, VOCABULARY) % VOCABULARY


def test_the_classes_are_found() -> None:
    assert {"Gemma3TextScaledWordEmbedding", "BartScaledWordEmbedding", OTHERWISE} <= set(CLASSES)
    assert len(CLASSES) > 10


@pytest.mark.parametrize("name", [name for name in CLASSES if name != OTHERWISE])
@torch.no_grad()
def test_every_installed_scaled_embedding_is_scale_times_the_table(name: str) -> None:
    layer, tokens = scaled(name), every_token()
    torch.testing.assert_close(layer(tokens), SCALE * layer.weight[tokens], rtol=0, atol=0)
    ops = find_ops(layer)
    assert ops is not None
    assert ops.kind == "scaled_embedding"
    model = OneLayer(layer)
    handle = lk.attach(model, lk.LoRA(rank=2), "layer")
    fill_with_noise(handle)
    expected = SCALE * (layer.weight + handle.delta("layer").T)[tokens]
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=SUM_ORDER)


def test_the_one_that_computes_otherwise_is_refused_by_name() -> None:
    module = importlib.import_module(CLASSES[OTHERWISE])
    signature = inspect.signature(getattr(module, OTHERWISE).__init__)
    assert "eoi_token_index" in signature.parameters  # that token is the reason
    layer = getattr(module, OTHERWISE)(VOCABULARY, WIDTH, PADDING, embed_scale=SCALE)
    with pytest.raises(UnsupportedLayerError, match=f"'layer' is a {OTHERWISE}, a Embedding with a forward of its own"):
        lk.attach(OneLayer(layer), lk.LoRA(rank=2), "layer")


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("make", [nn.Embedding, scaled], ids=["plain", "scaled"])
@pytest.mark.parametrize("method", WHOLE)
def test_it_equals_the_dense_truth_merged_and_by_position(method: str, make: object, padding: int | None) -> None:
    if make is scaled:
        layer = scaled("Gemma3TextScaledWordEmbedding")
        layer.padding_idx = padding
    else:
        layer = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
    model, tokens = OneLayer(layer), every_token()
    handle = lk.attach(model, method_named(method, rank=2), "layer")
    fill_with_noise(handle)
    scale = SCALE if make is scaled else 1.0
    base, truth = scale * layer.weight[tokens], scale * (layer.weight + handle.delta("layer").T)[tokens]
    torch.testing.assert_close(model(tokens), truth, rtol=0, atol=SUM_ORDER)
    torch.testing.assert_close(model(tokens[0, 4]), truth[0, 4], rtol=0, atol=SUM_ORDER)
    turns = torch.arange(2 * VOCABULARY).view(2, VOCABULARY) % 3 == 0
    with handle.routed([["default" if mine else None for mine in row] for row in turns.tolist()]):
        mixed = model(tokens)
    torch.testing.assert_close(mixed[turns], truth[turns], rtol=0, atol=SUM_ORDER)
    assert torch.equal(mixed[~turns], base[~turns])
    model(tokens).sum().backward()
    gradient = next(p for name, p in handle.parameters().items() if name.endswith("A") or name.endswith("A.0")).grad
    assert gradient is not None
    assert gradient.any(dim=0).tolist() == [token != padding for token in range(VOCABULARY)]
    handle.merge()
    torch.testing.assert_close(model(tokens), truth, rtol=0, atol=SUM_ORDER)


def test_a_padding_tokens_vector_stays_what_it_was_in_training() -> None:
    model = OneLayer(nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING))
    handle = lk.attach(model, lk.LoRA(rank=2), "layer")
    optimizer = torch.optim.SGD(handle.parameters().values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(every_token()) - 1).square().mean().backward()
        optimizer.step()
    handle.merge()
    assert not model.layer.get_parameter("weight")[PADDING].any()
    assert model.layer.get_parameter("weight")[PADDING + 1].any()


class Doubles(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Embedding(9, 4, max_norm=1.0), r"'layer' \(Embedding\).*: max_norm rewrites the base weight"),
        (Doubles(9, 4), "'layer' is a Doubles, a Embedding with a forward of its own: it cannot be adapted"),
    ],
)
def test_what_is_no_look_up_in_the_base_is_refused_by_name(layer: nn.Module, why: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=why):
        lk.attach(OneLayer(layer), lk.LoRA(rank=2), "layer")


def test_a_scaled_embedding_that_is_given_max_norm_is_refused_too() -> None:
    layer = scaled("Gemma3TextScaledWordEmbedding")
    layer.max_norm = 1.0
    with pytest.raises(UnsupportedLayerError, match="max_norm rewrites the base weight"):
        lk.attach(OneLayer(layer), lk.LoRA(rank=2), "layer")


def test_a_rank_above_the_width_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match=r"rank 7 is above the smaller side of 'layer' \(6 x 11\)"):
        lk.attach(OneLayer(nn.Embedding(VOCABULARY, WIDTH)), lk.LoRA(rank=7), "layer")


# Tied tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["embed", "head", "embed,head"])
@torch.no_grad()
def test_updates_of_a_tied_table_act_where_they_are_put(targets: str) -> None:
    model, tokens = Tower(tied=True).eval(), tokens_for()
    weight = model.embed.weight
    handle = lk.attach(model, lk.LoRA(rank=2), targets)
    fill_with_noise(handle)
    adapted = model(tokens)
    plain = Tower().eval()
    plain.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "lorakit" not in key})
    for path in handle.updates():
        ops = Site.at(model, path).ops
        plain.get_submodule(path).get_parameter("weight").add_(ops.as_weight(model.embed, handle.delta(path)))
    torch.testing.assert_close(adapted, plain(tokens), rtol=0, atol=SUM_ORDER)
    merged = handle.merge()
    assert merged.untied == [f"{path}.weight" for path in handle.updates()]
    torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    assert model.embed.weight is model.head.weight is weight


@torch.no_grad()
def test_a_tied_gemma_is_adapted_with_its_scale(tokens: Tensor) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    )
    model = Gemma3ForCausalLM(config).eval()
    base = model(tokens).logits
    handle = lk.attach(model, lk.DoRA(rank=2), "embed_tokens,lm_head,q_proj")
    torch.testing.assert_close(model(tokens).logits, base, rtol=0, atol=SUM_ORDER)
    assert handle.verify(tokens).num_sites == 4
    fill_with_noise(handle)
    adapted, state = model(tokens).logits, handle.state()
    assert state.sites["model.embed_tokens"].kind == "scaled_embedding"
    with handle.routed(["default", None, None, "default"]):
        mixed = model(tokens).logits
    assert torch.equal(mixed[[1, 2]], base[[1, 2]])
    torch.testing.assert_close(mixed[[0, 3]], adapted[[0, 3]], rtol=0, atol=SUM_ORDER)
    handle.merge()
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    handle.detach()
    Handle(model).add_state(state)
    assert torch.equal(model(tokens).logits, adapted)
