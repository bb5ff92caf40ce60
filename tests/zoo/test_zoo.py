"""Every model of the zoo: attached, trained some steps, saved, loaded, loaded in PEFT where PEFT can, merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import MergeError, VerificationError
from lorakit.formats import load_adapter, save_adapter
from lorakit.kernels import recompute

from .conftest import Trained, train
from .models import ZOO, Batch, batch, build, logits

# Both sides add the same products in fp32 in another order: up to some tens of ulps (1.2e-7 each) of the largest
# value on the way; activations of these models reach some tens, logits are of order 1 to 10.
SUM_ORDER = 2e-5

LOSS_SHARE = 0.95  # what is left after those steps, at most
NEW_TOKENS = 5


def test_some_steps_lower_the_loss(trained: Trained) -> None:
    before, after = trained.losses
    assert after < LOSS_SHARE * before


def test_training_leaves_every_byte_of_the_base(trained: Trained) -> None:
    before, after = trained.digests
    assert before == after


def test_training_moves_the_logits(trained: Trained) -> None:
    with trained.handle.disabled():
        base = logits(trained.model, trained.inputs)
    assert (trained.out - base).abs().max() > 100 * SUM_ORDER


def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_base(trained: Trained, saved: Path) -> None:
    fresh = build(trained.name)
    # torch multiplies in another order where a factor requires gradients: on both sides they do.
    load_adapter(fresh, saved, trainable=True)
    assert torch.equal(logits(fresh, trained.inputs), trained.out)


def test_peft_gives_the_same_logits_or_says_why_not(trained: Trained, saved: Path) -> None:
    peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")
    fresh, refusal = build(trained.name), ZOO[trained.name].peft_refuses
    if refusal:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            peft.PeftModel.from_pretrained(fresh, saved)
        return
    found = logits(peft.PeftModel.from_pretrained(fresh, saved).eval(), trained.inputs)
    torch.testing.assert_close(found, trained.out, rtol=0, atol=SUM_ORDER)


def test_merged_equals_unmerged(trained: Trained) -> None:
    trained.handle.merge()
    merged = logits(trained.model, trained.inputs)
    trained.handle.unmerge()
    torch.testing.assert_close(merged, trained.out, rtol=0, atol=SUM_ORDER)


def test_unmerging_restores_every_byte(trained: Trained) -> None:
    trained.handle.merge()
    trained.handle.unmerge()
    assert trained.handle.digest() == trained.digests[0]
    assert torch.equal(logits(trained.model, trained.inputs), trained.out)


def test_keeping_less_gives_the_same_gradients(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SMALLEST_BYTES", 0)
    parameters = list(trained.handle.parameters("default").values())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(trained.model(**trained.inputs)["loss"], parameters, allow_unused=True)

    every = gradients()
    with recompute.recomputing():
        less = gradients()
    pairs = list(zip(every, less, strict=True))
    assert all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def test_every_site_moves_the_output(trained: Trained) -> None:
    found = trained.handle.verify(**trained.inputs, digest_before=trained.digests[0])
    assert found.num_sites == len(trained.handle.updates())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generating_with_a_cache_equals_generating_without(name: str) -> None:
    model, inputs = adapted(name)
    with_cache = generated(model, inputs, use_cache=True)
    assert torch.equal(generated(model, inputs, use_cache=False), with_cache)
    assert not torch.equal(generated(build(name), inputs), with_cache)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_and_decoder_generates_the_same_tokens_merged(name: str) -> None:
    model, inputs = adapted(name)
    unmerged = generated(model, inputs)
    handle = lk.handle_of(model)
    assert handle is not None
    handle.merge()
    assert torch.equal(generated(model, inputs), unmerged)
    assert not torch.equal(generated(build(name), inputs), unmerged)


def test_a_layer_of_mamba_whose_weight_its_mixer_reads_is_found() -> None:
    """It is no target of a word; where it is named, nothing but ``verify`` can know."""
    handle = lk.attach(build("mamba"), lk.LoRA(rank=1), "in_proj,dt_proj,conv1d")
    with pytest.raises(
        VerificationError, match=r"4 of 6 sites do not move the output: .*'backbone.layers.0.mixer.dt_proj'"
    ):
        handle.verify(**batch("mamba"))


def test_a_convolution_that_computes_its_weight_is_adapted_but_not_merged() -> None:
    handle = lk.attach(build("wav2vec2"), lk.LoRA(rank=2, alpha=3), "pos_conv_embed.conv")
    assert handle.verify(**batch("wav2vec2")).num_sites == 1
    with pytest.raises(MergeError, match=r"'wav2vec2\.encoder\.pos_conv_embed\.conv' computes its weight"):
        handle.merge()


def test_a_router_is_adapted_where_its_weight_is_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")
    model, inputs = build("mixtral"), batch("mixtral")
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=3), "mlp.gate.weight")
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(torch.randn_like(parameter))
    expected = logits(model, inputs)
    save_adapter(handle, tmp_path)
    fresh = build("mixtral")
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, inputs), expected)
    found = logits(peft.PeftModel.from_pretrained(build("mixtral"), tmp_path).eval(), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=SUM_ORDER)


def adapted(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(3)
    trained = train(name)
    return trained.model, {key: value for key, value in trained.inputs.items() if key != "labels"}


def generated(model: Any, inputs: Batch, **options: Any) -> Tensor:
    """Return the likeliest tokens, always as many: an end is never chosen."""
    return model.generate(**inputs, **options, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
