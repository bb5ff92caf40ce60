"""``verify`` passes on good models, and finds a site whose weight a parent reads itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk
from lorakit.errors import VerificationError

from .models import METHODS, Tower, fill_with_noise, method_named, tokens_for

Build = Callable[..., nn.Module]


class ReadsItsChild(nn.Module):
    """A parent that multiplies by a child's weight and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.read.weight, self.read.bias)


@pytest.mark.parametrize("method", METHODS)
def test_a_site_that_its_parent_reads_is_found(method: str) -> None:
    handle = lk.attach(ReadsItsChild(), method_named(method))
    with pytest.raises(VerificationError, match="1 of 2 sites do not move the output: 'read'"):
        handle.verify(torch.randn(3, 6))


def test_a_module_trained_in_full_that_its_parent_reads_is_found() -> None:
    handle = lk.attach(ReadsItsChild(), lk.LoRA(rank=2), "called", train_modules="read")
    with pytest.raises(VerificationError, match="'read'"):
        handle.verify(torch.randn(3, 6))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("method", METHODS)
def test_every_site_of_a_good_model_passes(build: Build, tokens: Tensor, method: str, name: str) -> None:
    handle = lk.attach(build(name), method_named(method, rank=2), train_modules="head" if "bert" in name else ())
    found = handle.verify(tokens)
    assert found.num_sites == len(handle.updates()) + len(handle.entry("default").copies)


def test_every_site_of_an_encoder_and_decoder_passes(build: Build, tokens: Tensor) -> None:
    handle = lk.attach(build("t5"), lk.LoRA(rank=2))
    assert handle.verify(input_ids=tokens, decoder_input_ids=tokens).num_sites == 32


def test_verify_leaves_the_model_as_it_was() -> None:
    model, tokens = Tower(), tokens_for()
    handle = lk.attach(model, lk.LoRA(rank=2, dropout=0.5), train_modules="norm")
    fill_with_noise(handle)
    model.blocks[0].eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    handle.verify(tokens)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_verify_proves_that_the_base_has_its_digest() -> None:
    model, tokens = Tower(), tokens_for()
    handle = lk.attach(model, lk.LoRA(rank=2))
    digest = handle.digest()
    assert handle.verify(tokens, digest_before=digest).base_unchanged is True
    assert handle.verify(tokens).base_unchanged is None
    with torch.no_grad():
        model.embed.weight[3, 2] += 1e-3
    with pytest.raises(VerificationError, match="the base has changed"):
        handle.verify(tokens, digest_before=digest)


def test_verify_looks_at_each_adapter_that_acts() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2), "up", name="a")
    handle.add("b", lk.LoRA(rank=2), "up,head")
    handle.use(["a", "b"])
    assert handle.verify(tokens_for()).num_sites == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_verify_works_in_half_precision(dtype: torch.dtype) -> None:
    handle = lk.attach(Tower().to(dtype), lk.LoRA(rank=2), train_modules="head,embed,norm", targets="up,down")
    assert handle.verify(tokens_for()).num_sites == 7
