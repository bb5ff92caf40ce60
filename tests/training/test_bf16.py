"""Training over a base in bf16: the losses of fp32 to rounding, and no tensor of activations' size in fp32 of ours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit import kernels

VOCABULARY, ROWS, LENGTH, WIDTH = 96, 2, 32, 32
# bf16 rounds to 8 bits, 0.4 %; the loss is a mean over tokens of sums of many such numbers.
LOSS_TOLERANCE = 0.01


def a_model(dtype: torch.dtype) -> Any:
    """Return a small LLaMA whose weights are numbers of bf16 in any dtype."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).to(dtype)


def ids() -> Tensor:
    """Return token ids that follow a rule, so that there is something to learn."""
    return (torch.arange(LENGTH) * 7 + torch.arange(ROWS)[:, None] * 5) % VOCABULARY


def losses(dtype: torch.dtype, steps: int = 12) -> list[float]:
    """Train an adapter and return the loss of every step."""
    model = a_model(dtype)
    handle = lk.attach(model, lk.LoRA(rank=4), seed=0)
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


class WideTensors(TorchDispatchMode):
    """Counts the new fp32 tensors with as many numbers as a layer's input, by operation and shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _is_wide(leaf) and leaf.untyped_storage()._cdata not in given:
                self.found[str(func), tuple(leaf.shape)] += 1
        return result


def _is_wide(tensor: Tensor) -> bool:
    rows = (tensor.shape[0], tensor.shape[:2].numel()) if tensor.dim() > 1 else ()
    return tensor.dtype == torch.float32 and tensor.numel() >= ROWS * LENGTH * WIDTH and ROWS * LENGTH in rows


def wide_tensors(model: nn.Module) -> Counter[tuple[str, tuple[int, ...]]]:
    """Return the fp32 tensors of one forward and backward down to the embedded inputs."""
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()  # type: ignore[operator]
    watch = WideTensors()
    with watch:
        model(inputs_embeds=embedded).logits.sum().backward()
    return watch.found


def test_losses_in_bf16_are_those_of_fp32_to_rounding() -> None:
    half, full = losses(torch.bfloat16), losses(torch.float32)
    assert half == pytest.approx(full, rel=LOSS_TOLERANCE)


def test_the_run_in_bf16_learns() -> None:
    found = losses(torch.bfloat16)
    assert found[-1] < (1 - 5 * LOSS_TOLERANCE) * found[0]


@pytest.mark.parametrize("paths", ["fast", "plain"])
@pytest.mark.parametrize(
    "method", [lk.LoRA(rank=4), lk.LoRA(rank=4, dropout=0.1), lk.DoRA(rank=4)], ids=["lora", "dropout", "dora"]
)
def test_an_adapter_makes_no_activation_in_fp32_that_the_base_does_not_make(method: lk.LoRA, paths: Any) -> None:
    model = a_model(torch.bfloat16)
    model.requires_grad_(False)
    alone = wide_tensors(model)
    lk.attach(model, method, seed=0)
    with kernels.use(paths):
        adapted = wide_tensors(model)
    assert adapted - alone == Counter()


def test_the_watch_sees_a_copy_in_fp32() -> None:
    model = a_model(torch.bfloat16)
    before = wide_tensors(model)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: (out.float() * 2).to(out.dtype))
    assert sum((wide_tensors(model) - before).values()) >= 2
