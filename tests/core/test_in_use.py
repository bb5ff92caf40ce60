"""In real surroundings: gradient checkpointing, HF's Trainer, accelerate's hooks, a loop of one's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import UnsupportedLayerError

from .models import OneLayer, Tower, fill_with_noise, tokens_for

Build = Callable[..., nn.Module]


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    # The name without the deprecation, where this version of transformers has it.
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": reentrant})


def gradients(model: nn.Module, handle: Handle, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**inputs).loss.backward()
    return {
        key: p.grad if p.grad is not None else torch.full_like(p, torch.nan) for key, p in handle.parameters().items()
    }


def inputs_for(name: str, tokens: Tensor) -> dict[str, Tensor]:
    if name == "vit":  # transformers sees to the gradient of token inputs itself, not to that of pixels
        return {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    if name == "bert":
        return {"input_ids": tokens, "labels": torch.tensor([0, 1, 2, 0])}
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["switched on before attaching", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_checkpointing_gives_the_gradients_without_it(
    build: Build, tokens: Tensor, name: str, before: bool, reentrant: bool
) -> None:
    model = build(name)
    for module in model.modules():  # dropout would differ: it is drawn anew in every forward
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    if before:
        checkpointed(model, reentrant)
    handle = lk.attach(model, lk.LoRA(rank=2))
    fill_with_noise(handle)
    if not before:
        checkpointed(model, reentrant)
    inputs = inputs_for(name, tokens)
    found = gradients(model, handle, **inputs)
    switch_off = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    switch_off()
    expected = gradients(model, handle, **inputs)
    for key, gradient in expected.items():
        assert gradient.abs().sum() > 0
        # The block's forward is the same twice; its sums may run in another order: fp32 ulps, carried
        # through some ten layers.
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_the_hooks_for_checkpointing_go_with_the_handle(build: Build) -> None:
    model = build("llama")
    handle = lk.attach(model, lk.LoRA(rank=2))
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    handle.detach()
    assert not model.get_input_embeddings()._forward_hooks


def test_without_checkpointing_the_embeddings_output_needs_no_gradient(build: Build, tokens: Tensor) -> None:
    model = build("llama").train()
    lk.attach(model, lk.LoRA(rank=2), layers="last:1")
    outs: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: outs.append(out))
    model(tokens)
    assert not outs[0].requires_grad


def test_hf_trainer_trains_the_adapter_and_not_the_base(build: Build, tokens: Tensor, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = build("bert")
    handle = lk.attach(model, lk.LoRA(rank=2), train_modules="head")
    digest, start = handle.digest(), {key: p.detach().clone() for key, p in handle.parameters().items()}
    rows = [{"input_ids": row, "labels": torch.tensor(place % 3)} for place, row in enumerate(tokens.repeat(2, 1))]
    arguments = TrainingArguments(
        output_dir=os.fspath(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert handle.digest() == digest
    assert all(not torch.equal(p, start[key]) for key, p in handle.parameters().items())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in handle.parameters().values()}


def test_a_loop_of_ones_own_learns(build: Build, tokens: Tensor) -> None:
    model = build("llama").train()
    handle = lk.attach(model, lk.LoRA(rank=4), "all-linear,lm_head")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.parameters().values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_generating_uses_the_adapter_and_its_cache(build: Build, tokens: Tensor) -> None:
    model = build("llama")
    handle = lk.attach(model, lk.LoRA(rank=2))
    fill_with_noise(handle, size=0.5)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    cached = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), **settings)
    plain = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), use_cache=False, **settings)
    assert torch.equal(cached, plain)


# accelerate -----------------------------------------------------------------------------------------


def hooked(model: OneLayer) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubles(ModelHook):
        """Double the input, so that one sees whether the hook still runs."""

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (2 * args[0],), kwargs

    add_hook_to_module(model.layer, Doubles())


def without_hook(model: OneLayer) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model.layer)


@pytest.mark.parametrize("hook_first", [True, False], ids=["hook before attaching", "hook after attaching"])
@pytest.mark.parametrize("detach_first", [True, False], ids=["detached, then unhooked", "unhooked, then detached"])
def test_an_update_and_accelerates_hook_both_act_and_both_go(hook_first: bool, detach_first: bool) -> None:
    model, x = OneLayer(nn.Linear(6, 10)).eval(), torch.randn(3, 6)
    base = model(x), model(2 * x)
    if hook_first:
        hooked(model)
    handle = lk.attach(model, lk.LoRA(rank=2), "layer")
    fill_with_noise(handle)
    delta = handle.delta("layer")
    if not hook_first:
        hooked(model)
    torch.testing.assert_close(model(x), base[1] + 2 * x @ delta.t())
    with handle.disabled():
        assert torch.equal(model(x), base[1])
    with handle.routed(["default", None, "default"]):
        torch.testing.assert_close(model(x)[1], base[1][1])
    handle.merge()
    torch.testing.assert_close(model(x), base[1] + 2 * x @ delta.t())
    handle.unmerge()
    if detach_first:
        handle.detach()
        assert torch.equal(model(x), base[1])
        without_hook(model)
    else:
        without_hook(model)
        torch.testing.assert_close(model(x), base[0] + x @ delta.t())
        handle.detach()
    assert torch.equal(model(x), base[0])


@pytest.mark.parametrize(
    "forward", [lambda x: x, functools.partial(nn.Linear(6, 10).forward)], ids=["function", "partial"]
)
def test_an_unknown_forward_on_the_instance_is_refused_by_name(forward: Callable[[Tensor], Tensor]) -> None:
    model = OneLayer(nn.Linear(6, 10))
    model.layer.forward = forward
    with pytest.raises(UnsupportedLayerError, match="layer 'layer' has a forward set on the instance"):
        lk.attach(model, lk.LoRA(rank=2), "layer")


def test_an_unknown_forward_on_a_module_trained_in_full_is_refused_too() -> None:
    model = Tower()
    model.head.forward = lambda x: x
    with pytest.raises(UnsupportedLayerError, match="layer 'head' has a forward set on the instance"):
        lk.attach(model, lk.LoRA(rank=2), "up", train_modules="head")


def test_users_hooks_run_around_the_update() -> None:
    model, tokens = Tower().eval(), tokens_for()
    handle = lk.attach(model, lk.LoRA(rank=2), "head")
    fill_with_noise(handle)
    seen: list[Tensor] = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out))
    out = model(tokens)
    assert torch.equal(seen[0], out)
