"""Keeping less for the backward pass: the same bits from fewer tensors."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.kernels import recompute
from lorakit.kernels.recompute import recomputing

WIDTH, INNER, ROWS, TOKENS = 64, 176, 2, 128


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small tensors again too."""
    monkeypatch.setattr(recompute, "SMALLEST_BYTES", 0)


def llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def kept_bytes(monkeypatch: pytest.MonkeyPatch, model: nn.Module, ids: Tensor, *, less: bool) -> int:
    """Return the bytes kept for the backward pass of a model's body, each storage once, without its weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []
    with monkeypatch.context() as patch:
        original = recompute._Kept.__init__

        def noted(self: Any, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
            original(self, tensor, dtype)
            kept.append(tensor)

        patch.setattr(recompute._Kept, "__init__", noted)
        every = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
        with recomputing() if less else every:
            out = model.get_submodule("model")(input_ids=ids).last_hidden_state
    assert out.requires_grad
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_keeps_less_than_six_tenths_of_full_training(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    ids = torch.randint(0, 96, (ROWS, TOKENS))
    full = kept_bytes(monkeypatch, llama(), ids, less=False)
    adapted = llama()
    lk.attach(adapted, lk.LoRA(rank=2, alpha=3, dropout=dropout))
    plain = kept_bytes(monkeypatch, adapted, ids, less=False)
    less = kept_bytes(monkeypatch, adapted, ids, less=True)
    assert less < 0.6 * full < 0.9 * full < plain * 1.1  # plain LoRA keeps nearly as much as full training


@pytest.mark.parametrize("method", [lk.LoRA(rank=2, alpha=3, dropout=0.1), lk.DoRA(rank=2, alpha=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_gives_the_same_bits(method: lk.Method, dtype: torch.dtype) -> None:
    def trained(context: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
        model = llama(dtype)
        handle = lk.attach(model, method, seed=1)
        parameters = list(handle.parameters("default").values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        torch.manual_seed(2)
        found = []
        for _ in range(3):
            ids = torch.randint(0, 96, (ROWS, TOKENS))
            with context:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return [*found, *(parameter.detach() for parameter in parameters)]

    less, every = trained(recomputing()), trained(contextlib.nullcontext())
    assert all(torch.equal(one, other) for one, other in zip(less, every, strict=True))


def gated(x: Tensor) -> Tensor:
    return F.silu(x) * (x.transpose(0, 1).reshape(x.shape) * 0.5)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))


def normed(x: Tensor) -> Tensor:
    wide = x.float()
    return torch.ones(x.shape[-1]) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def written_to(x: Tensor) -> Tensor:
    y = x * 2.0
    y.mul_(3.0)
    y += x.exp()
    return y * F.gelu(y)


def of_parts(x: Tensor) -> Tensor:
    one, other = (x * 1.5).chunk(2, dim=-1)
    return torch.cat([F.gelu(one, approximate="tanh") * other, other.reshape(-1).view(other.shape)], dim=-1)


SCALE, SHIFT = torch.linspace(0.5, 1.5, 8), torch.linspace(-1, 1, 8)


def layer_normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), SCALE, SHIFT, 1e-12) * 2.0


FUNCTIONS = [layer_normed, gated, tanh_gelu, normed, written_to, of_parts]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_operations_are_done_again_to_the_bit(function: Any) -> None:
    W = torch.randn(6, 8)

    def gradient(context: contextlib.AbstractContextManager[Any]) -> Tensor:
        x = torch.linspace(-2, 2, 48, requires_grad=True)
        with context:
            y = function((x.view(8, 6) * 1.0) @ W)
            out = (y @ y.t()).square().sum()
        return torch.autograd.grad(out, x)[0]

    assert torch.equal(gradient(recomputing()), gradient(contextlib.nullcontext()))


def test_second_derivatives() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    with recomputing():
        assert torch.autograd.gradgradcheck(lambda x: gated(x * 1.0), x)


def test_a_second_backward_pass_finds_everything() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    with recomputing():
        out = gated(x * 1.0).square().sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, x)[0])


def test_what_is_written_to_after_its_use_is_refused() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    with recomputing():
        y = x * 1.0
        out = (F.silu(y) * x).sum()
    y.detach().add_(1.0)
    with pytest.raises(RuntimeError, match=r"written to after it was used.*\[4, 5\]"):
        out.backward()


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("smallest", [0, 2**20])
def test_a_graph_that_is_dropped_leaves_nothing(monkeypatch: pytest.MonkeyPatch, smallest: int) -> None:
    monkeypatch.setattr(recompute, "SMALLEST_BYTES", smallest)
    x = torch.randn(1, 4, 8, requires_grad=True)
    with no_collector(), recomputing():
        y = x * 1.0
        out = layer_normed(normed(gated(F.scaled_dot_product_attention(y, y, y)[0])))
        node, witness = y.grad_fn, nn.Module()
        assert node is not None
        node.metadata["witness"] = witness
        seen = weakref.ref(witness)
        del y, out, node, witness
    assert seen() is None


def test_a_layer_norm_of_an_odd_epsilon_is_kept() -> None:
    node = F.layer_norm(torch.randn(4, 8, requires_grad=True), (8,), torch.ones(8), None, 0.37).grad_fn
    assert recompute._how(node, 0, 1) is None
    usual = F.layer_norm(torch.randn(4, 8, requires_grad=True), (8,), torch.ones(8), None, 1e-6).grad_fn
    assert recompute._how(usual, 0, 1) is not None
