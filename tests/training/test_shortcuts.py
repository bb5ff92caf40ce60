"""What a step leaves out changes neither its loss nor its gradients, and is left in where it would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
)

from lorakit.adapters import attach
from lorakit.kernels import use
from lorakit.kernels.head_loss import IDENTITY, Curve
from lorakit.methods.lora import LoRA
from lorakit.training.data.encode import IGNORED, EncodedRow
from lorakit.training.fit import fit
from lorakit.training.memory import peak_bytes
from lorakit.training.mode import training_mode
from lorakit.training.spec import TaskSpec
from lorakit.training.tasks.cross_entropy import PIECE_NUMBERS, summed_cross_entropy
from lorakit.training.tasks.shortcuts import NONE, Shortcuts, explained, frozen_head, head_of
from lorakit.training.tasks.writing import Writing

from .tiny import SIZES

Build = Callable[..., nn.Module]
BOTH = Shortcuts(supervised_only=True, without_mask=True)
CONFIGS: dict[str, Any] = {
    # Scores that the model scales or caps behind its head, positions that it reads off the mask, experts.
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
    "granite": GraniteConfig(**SIZES, logits_scaling=7.0),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    ),
}
# The same fp32 products, summed in another order.
CLOSE = 1e-5


def task(encoder_decoder: bool = False) -> Writing:
    found = TaskSpec("generation", max_length=32, encoder_decoder=encoder_decoder).kind
    assert isinstance(found, Writing)
    return found


def rows(count: int = 4) -> list[EncodedRow]:
    """Return rows of unlike lengths whose first tokens are given."""
    found = []
    for i in range(count):
        ids = [3 + (7 * i + 5 * place) % 30 for place in range(9 + 3 * i)]
        found.append(EncodedRow(ids, [IGNORED] * 4 + ids[4:], i, "", ""))
    return found


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)  # scores as large as a trained model's
    return model


def loss_and_gradients(kind: Writing, model: nn.Module, shortcuts: Shortcuts) -> list[Tensor]:
    model.zero_grad()
    loss = kind.loss(model, kind.collator(0)(rows()), shortcuts)
    loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_the_same(kind: Writing, model: nn.Module, shortcuts: Shortcuts) -> None:
    whole, less = (loss_and_gradients(kind, model, found) for found in (NONE, shortcuts))
    assert len(whole) == len(less)
    for a, b in zip(whole, less, strict=True):
        torch.testing.assert_close(b, a, rtol=CLOSE, atol=CLOSE * float(a.abs().max()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_and_its_gradients_are_what_they_were(kind: str) -> None:
    model = model_of(kind)
    assert task().shortcuts(model, task().collator(0), rows()) == BOTH
    assert_the_same(task(), model, BOTH)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoders_of_the_suite_take_both(build: Build, kind: str) -> None:
    model = build(kind)
    assert task().shortcuts(model, task().collator(0), rows()) == BOTH
    assert_the_same(task(), model, BOTH)


def test_an_encoder_sees_both_ways_and_keeps_its_mask(build: Build) -> None:
    kind, model = task(encoder_decoder=True), build("t5")
    found = kind.shortcuts(model, kind.collator(0), rows())
    assert found == Shortcuts(supervised_only=True)
    assert_the_same(kind, model, found)


class Peeking(LlamaForCausalLM):  # type: ignore[misc]
    """Adds the mean of all tokens to each: what stands behind a token matters."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        vectors = self.get_input_embeddings()(input_ids)
        share = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (vectors * share[..., None]).sum(1, keepdim=True) / share.sum(1)[:, None, None]
        return super().forward(inputs_embeds=vectors + mean, attention_mask=attention_mask, **kwargs)


class Centred(LlamaForCausalLM):  # type: ignore[misc]
    """Takes the mean over positions off its scores."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits - found.logits.mean(1, keepdim=True)
        return found


class Unasked(LlamaForCausalLM):  # type: ignore[misc]
    """Multiplies by its head's weight without calling the head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        found.logits = F.linear(found.last_hidden_state, self.lm_head.weight)
        return found


def odd(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(LlamaConfig(**SIZES)).eval()
    return model


def test_a_model_whose_tokens_see_the_padding_keeps_its_mask() -> None:
    model = odd(Peeking)
    assert task().shortcuts(model, task().collator(0), rows()) == Shortcuts(supervised_only=True)


def test_a_model_that_compares_positions_keeps_them_all() -> None:
    assert not task().shortcuts(odd(Centred), task().collator(0), rows()).supervised_only


def test_a_head_that_is_never_called_costs_nothing_but_the_gain() -> None:
    assert_the_same(task(), odd(Unasked), BOTH)


def test_what_could_not_be_left_out_is_said() -> None:
    assert explained(BOTH, BOTH) is None
    said = explained(Shortcuts(supervised_only=True), BOTH)
    assert said is not None
    assert "its attention is masked" in said
    assert "positions" not in said


def test_a_run_says_what_it_could_not_leave_out(tokenizer: Any, rows_of: Any) -> None:
    result = fit(odd(Peeking), rows_of("prompted"), tokenizer=tokenizer("llama"), max_steps=2, validation=0.2)
    assert any("its attention is masked" in note for note in result.summary.notes)


def test_a_compiled_model_computes_everything(build: Build) -> None:
    compiled: Any = torch.compile(build("llama"), backend="aot_eager")
    assert task().shortcuts(compiled, task().collator(0), rows()) == NONE


def test_the_trial_leaves_no_trace(build: Build) -> None:
    model = build("llama").train()
    generator = torch.get_rng_state()
    task().shortcuts(model, task().collator(0), rows())
    head: Any = head_of(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert not head._forward_pre_hooks


def test_no_keys_and_values_are_kept_while_learning(build: Build) -> None:
    model, seen = build("llama"), []
    hook = model.register_forward_hook(lambda module, args, out: seen.append(out.past_key_values))
    task().loss(model, task().collator(0)(rows()))
    hook.remove()
    assert seen == [None]


def test_scores_of_given_tokens_take_no_memory() -> None:
    words, kind = 4096, task()
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": words}))
    long = [EncodedRow([5] * 32, [IGNORED] * 30 + [5] * 2, i, "", "") for i in range(8)]
    batch = kind.collator(0)(long)

    def peak(shortcuts: Shortcuts) -> int:
        return peak_bytes(lambda: kind.loss(model, batch, shortcuts).backward(), torch.device("cpu"))

    # 8 x 30 positions less, forward and in the gradient, in fp32.
    assert peak(NONE) - peak(Shortcuts(supervised_only=True)) >= 2 * 8 * 30 * words * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "words"), [(0, 7), (5, 7), (PIECE_NUMBERS // 4096 + 100, 4096)])
def test_the_cross_entropy_in_pieces_is_torchs(dtype: torch.dtype, count: int, words: int) -> None:
    torch.manual_seed(0)
    truth = torch.randint(words, (count,))
    ours = (3 * torch.randn(count, words)).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    found = summed_cross_entropy(ours, truth)
    expected = F.cross_entropy(theirs if dtype == torch.float64 else theirs.float(), truth, reduction="sum")
    found.backward()
    expected.backward()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)  # sums of the same terms in another order
    # Rounded to the scores' dtype once; in fp32 the exponent's argument, of size 10, has an error of 1e-6 itself.
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-7)


# The loss without the model's own scores. -----------------------------------------------------------

TIGHT = 1e-6
"""As a share of the largest: the same fp32 products; only the softmax's sums are taken in another order."""
FROZEN: dict[str, tuple[Any, Curve]] = {
    "cohere": (CONFIGS["cohere"], Curve(0.3)),
    "gemma2": (CONFIGS["gemma2"], Curve(1.0, 2.0)),
    "granite": (CONFIGS["granite"], Curve(1 / 7)),
    "mixtral": (CONFIGS["mixtral"], IDENTITY),
    "opt": (CONFIGS["opt"], IDENTITY),
    "qwen2": (Qwen2Config(**SIZES), IDENTITY),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), IDENTITY),
    "neox": (
        GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        IDENTITY,
    ),
    "bloom": (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), IDENTITY),
}


def adapted(model: nn.Module, **attaching: Any) -> nn.Module:
    """Freeze a model and attach an adapter that already does something."""
    attach(model.requires_grad_(False), LoRA(rank=4, alpha=3), seed=1, **attaching)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    return model


def found_for(model: nn.Module, encoder_decoder: bool = False) -> Shortcuts:
    kind = task(encoder_decoder)
    return kind.shortcuts(model, kind.collator(0), rows())


def assert_the_same_steps(kind: Writing, model: nn.Module, shortcuts: Shortcuts, tolerance: float) -> None:
    plain, fused = (loss_and_gradients(kind, model, found) for found in (replace(shortcuts, curve=None), shortcuts))
    assert len(plain) == len(fused) > 1
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize("kind", FROZEN)
def test_the_curve_behind_a_frozen_head_is_found(kind: str) -> None:
    torch.manual_seed(0)
    config, expected = FROZEN[kind]
    curve = found_for(adapted(AutoModelForCausalLM.from_config(config).eval())).curve
    assert curve is not None
    assert curve.factor == pytest.approx(expected.factor, rel=1e-6)  # a division and a product in fp32
    assert curve.cap == expected.cap


@pytest.mark.parametrize("kind", FROZEN)
def test_the_loss_without_the_models_scores_and_its_gradients_are_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model = adapted(AutoModelForCausalLM.from_config(FROZEN[kind][0]).eval())
    assert_the_same_steps(task(), model, Shortcuts(True, True, found_for(model).curve), TIGHT)


def test_an_encoder_decoder_learns_without_its_own_scores(build: Build) -> None:
    model = adapted(build("t5"))
    found = found_for(model, encoder_decoder=True)
    assert found == Shortcuts(supervised_only=True, curve=IDENTITY)
    assert_the_same_steps(task(encoder_decoder=True), model, found, TIGHT)


@pytest.mark.parametrize("kind", ["cohere", "gemma2", "qwen2"])
def test_in_bf16_loss_and_gradients_are_as_close_as_bf16_is(kind: str) -> None:
    torch.manual_seed(0)
    model = adapted(AutoModelForCausalLM.from_config(FROZEN[kind][0]).to(torch.bfloat16).eval())
    found = found_for(model)
    plain, fused = (loss_and_gradients(task(), model, s) for s in (replace(found, curve=None), found))
    # The gradient into the body is rounded once more, to 2^-9; the curve is not rounded to bf16 as the model's is.
    torch.testing.assert_close(fused[0], plain[0], rtol=2e-3, atol=0.0)
    for a, b in zip(plain[1:], fused[1:], strict=True):
        assert float((a - b).norm()) <= 2e-2 * float(a.norm())


def test_under_gradient_checkpointing_nothing_changes(build: Build) -> None:
    model: Any = adapted(build("llama"))
    found = found_for(model)
    assert found.curve == IDENTITY
    plain = loss_and_gradients(task(), model, NONE)
    with training_mode(model, grad_checkpointing=True):
        fused = loss_and_gradients(task(), model, found)
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(b, a, rtol=CLOSE, atol=CLOSE * float(a.abs().max()))


class Shifted(LlamaForCausalLM):  # type: ignore[misc]
    """Adds a number to one word's score."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits + torch.nn.functional.one_hot(torch.tensor(5), found.logits.shape[-1])
        return found


class Squared(LlamaForCausalLM):  # type: ignore[misc]
    """Bends its scores as no curve here does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits + 0.01 * found.logits.square()
        return found


@pytest.mark.parametrize("kind", [Centred, Unasked, Shifted, Squared])
def test_a_model_that_does_something_else_with_its_scores_computes_them(kind: type[nn.Module]) -> None:
    assert found_for(adapted(odd(kind))).curve is None


def _trained(model: Any) -> None:
    model.get_output_embeddings().requires_grad_(True)


def _hooked(model: Any) -> None:
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out)


def _replaced(model: Any) -> None:
    head = model.get_output_embeddings()
    head.forward = lambda hidden: nn.functional.linear(hidden, head.weight)


def _of_another_class(model: Any) -> None:
    model.get_output_embeddings().__class__ = type("Own", (nn.Linear,), {})


@pytest.mark.parametrize("change", [_trained, _hooked, _replaced, _of_another_class])
def test_a_head_that_is_more_than_a_frozen_product_is_run(build: Build, change: Callable[[Any], None]) -> None:
    model = adapted(build("llama"))
    assert frozen_head(model) is not None
    change(model)
    assert frozen_head(model) is None
    assert found_for(model).curve is None


@pytest.mark.parametrize("attaching", [{"train_modules": ["lm_head"]}, {"targets": ["lm_head", "q_proj"]}])
def test_a_head_that_is_adapted_or_copied_is_run(build: Build, attaching: dict[str, Any]) -> None:
    model = adapted(build("llama"), **attaching)
    assert found_for(model).curve is None
    # Also where it was adapted after the trial.
    assert_the_same_steps(task(), model, Shortcuts(True, True, IDENTITY), TIGHT)


def test_the_plain_paths_compute_all_scores(build: Build) -> None:
    model = adapted(build("llama"))
    with use("plain"):
        assert found_for(model).curve is None
    assert found_for(model).curve == IDENTITY


def test_the_head_is_as_it_was_after_a_loss_and_after_an_error(build: Build) -> None:
    model: Any = adapted(build("llama"))
    batch = task().collator(0)(rows())
    task().loss(model, batch, Shortcuts(True, True, IDENTITY))
    assert "forward" not in model.lm_head.__dict__
    with pytest.raises(IndexError):
        task().loss(model, {**batch, "input_ids": batch["input_ids"] + 10_000}, Shortcuts(True, True, IDENTITY))
    assert "forward" not in model.lm_head.__dict__


def test_an_evaluation_is_the_same_and_holds_no_scores(build: Build) -> None:
    model = adapted(build("llama"))
    kind = task()
    with use("plain"):
        plain = kind.evaluate(model, rows(), kind.collator(0))
    fused = kind.evaluate(model, rows(), kind.collator(0))
    assert fused.loss == pytest.approx(plain.loss, rel=TIGHT)
    assert (fused.accuracy, fused.num_tokens) == (plain.accuracy, plain.num_tokens)


def test_all_scores_of_a_large_vocabulary_never_exist() -> None:
    words, kind = 16_384, task()
    model = adapted(LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": words})).eval())
    long = [EncodedRow([5] * 32, [5] * 32, i, "", "") for i in range(32)]
    batch, whole = kind.collator(0)(long), 32 * 31 * words * 4

    def peak(shortcuts: Shortcuts) -> int:
        return peak_bytes(lambda: kind.loss(model, batch, shortcuts).backward(), torch.device("cpu"))

    assert peak(Shortcuts(True, True)) >= 2 * whole  # scores and their gradient
    assert peak(Shortcuts(True, True, IDENTITY)) <= whole / 3
