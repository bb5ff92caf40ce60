"""The simulated step takes what a real one takes, and large models lie on the line of their blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from lorakit.errors import ModelError
from lorakit.methods import find_method
from lorakit.training.costs import PARTS, Setup, cost_of, probe, simulate
from lorakit.training.costs.extend import num_like_blocks, with_blocks
from lorakit.training.data.encode import EncodedRow
from lorakit.training.plan import Plan
from lorakit.training.spec import TaskSpec

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=3, pad_token_id=0),
    "bert": BertConfig(**SIZES, num_hidden_layers=3, pad_token_id=0, num_labels=3),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=128, pad_token_id=0),
}
CLOSE = 0.01
"""Small integers (indices of the supervised positions) and tensors inside one operation are not the same."""


def setup_for(kind: str, method: str | None = "lora", **plan: Any) -> Setup:
    """Return a setup of one of the three models."""
    labels = ("a", "b", "c") if kind == "bert" else ()
    task = "classification" if labels else "language-modeling"
    attaching = {"seed": 0, "train_modules": ["head"] if labels else []}
    chosen = find_method(method) if method else None
    steps = Plan(10, **{"batch_size": 4, "micro_batch": 4, "lr": 1e-3, **plan})
    return Setup(CONFIGS[kind], torch.float32, TaskSpec(task, labels, max_length=128), chosen, attaching, steps)


def rows_for(setup: Setup, count: int = 4, length: int = 64, shorter: int = 0) -> list[EncodedRow]:
    """Return rows of a length, each ``shorter`` than the one before."""
    lengths = [length - i * shorter for i in range(count)]
    return [EncodedRow([5] * n, 0 if setup.spec.labels else [5] * n, i, "", "") for i, n in enumerate(lengths)]


def measured(setup: Setup, rows: list[EncodedRow]) -> int:
    """Take the step for real."""
    auto: Any = AutoModelForSequenceClassification if setup.spec.labels else AutoModelForCausalLM
    model = auto.from_config(setup.config, dtype=setup.dtype).requires_grad_(False).eval()
    kind = setup.spec.kind
    return probe(model, kind, kind.collator(0), setup.method, setup.attaching, setup.plan, rows).peak_bytes


@pytest.mark.parametrize("method", ["lora", "dora", "head", None])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_the_estimate_is_the_measured_memory(kind: str, method: str | None) -> None:
    if (kind, method) == ("gpt2", "head"):
        pytest.skip("GPT-2's head is tied to its embedding and is refused")
    setup = setup_for(kind, method)
    rows = rows_for(setup)
    assert simulate(setup, rows).memory.above_weights == pytest.approx(measured(setup, rows), rel=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_the_estimate_knows_what_is_made_again(kind: str, dtype: torch.dtype) -> None:
    setup = replace(setup_for(kind, recompute=True), dtype=dtype)
    rows = rows_for(setup)
    less = simulate(setup, rows).memory.above_weights
    assert less == pytest.approx(measured(setup, rows), rel=CLOSE)
    assert less < simulate(replace(setup, plan=replace(setup.plan, recompute=False)), rows).memory.above_weights


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_the_estimate_knows_the_optimizer(optimizer: str) -> None:
    setup = setup_for("llama", optimizer=optimizer)
    rows = rows_for(setup)
    assert simulate(setup, rows).memory.above_weights == pytest.approx(measured(setup, rows), rel=CLOSE)


def test_the_estimate_knows_padding() -> None:
    setup = setup_for("llama")
    rows = rows_for(setup, shorter=3)
    assert simulate(setup, rows).memory.above_weights == pytest.approx(measured(setup, rows), rel=CLOSE)


def test_the_estimate_knows_accumulation() -> None:
    setup = setup_for("bert", batch_size=4, micro_batch=2)
    found = simulate(setup, rows_for(setup, 2)).memory.above_weights
    assert found == pytest.approx(measured(setup, rows_for(setup, 4)), rel=CLOSE)


def test_the_estimate_knows_bf16() -> None:
    setup = replace(setup_for("llama", dtype="bf16"), dtype=torch.bfloat16)
    rows = rows_for(setup)
    assert simulate(setup, rows).memory.above_weights == pytest.approx(measured(setup, rows), rel=CLOSE)


def test_a_probe_leaves_the_base_as_it_was() -> None:
    setup = setup_for("llama")
    model = AutoModelForCausalLM.from_config(setup.config).requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = setup.spec.kind
    probe(model, kind, kind.collator(0), setup.method, setup.attaching, setup.plan, rows_for(setup))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("init", "share"), [("kaiming", 1), ("pissa", 2)])
def test_the_file_holds_the_frozen_start_too(init: str, share: int) -> None:
    setup = setup_for("llama", {"name": "lora", "rank": 4, "init": init})  # type: ignore[arg-type]
    cost = simulate(setup, rows_for(setup))
    assert cost.saved_bytes == share * cost.trained_bytes


def test_the_parts_of_a_lora_step_are_where_they_belong() -> None:
    setup = setup_for("llama", {"name": "lora", "rank": 8})  # type: ignore[arg-type]
    cost = simulate(setup, rows_for(setup))
    size = 4 * cost.num_trainable
    assert cost.memory.adapter == cost.trained_bytes == size
    assert cost.memory.optimizer >= 2 * size
    assert cost.peaks.update.gradients == size
    # The scores of 4 x 63 positions in fp32, once: they fit in one piece, and the softmax is made in their place.
    assert cost.memory.logits == 4 * 4 * 63 * 320
    assert cost.memory.total == sum(getattr(cost.memory, part) for part in PARTS)


def test_frozen_weights_take_no_gradients_flops() -> None:
    full, lora = (simulate(setup_for("llama", m), rows_for(setup_for("llama"))).flops for m in (None, "lora"))
    # Forward 2 N, backward 4 N, of which a frozen base leaves 2 N out; the adapter's own products are small.
    assert 0.6 < lora / full < 0.85


@pytest.mark.parametrize("method", ["lora", "head", None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_extension_is_the_whole_simulation(method: str | None, checkpointing: bool) -> None:
    setup = setup_for("llama", method, grad_checkpointing=checkpointing)
    setup = replace(setup, config=with_blocks(setup.config, 11))
    rows = rows_for(setup)
    assert num_like_blocks(setup) == 11
    extended, whole = cost_of(setup, rows), simulate(setup, rows)
    assert extended.memory == whole.memory
    assert extended.num_trainable == whole.num_trainable


@pytest.mark.parametrize("attaching", [{"layers": "last:2"}, {"targets": "re:.*q_proj"}, {"exclude": ["layers.0.mlp"]}])
def test_adapters_on_some_blocks_are_simulated_whole(attaching: dict[str, Any]) -> None:
    setup = setup_for("llama")
    setup = replace(setup, config=with_blocks(setup.config, 11), attaching={**setup.attaching, **attaching})
    assert num_like_blocks(setup) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_knows_grouped_products_of_experts(dtype: torch.dtype) -> None:
    sizes = {**SIZES, "intermediate_size": 176}  # torch groups bf16 products of multiples of 16 bytes alone
    config = MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=4, num_key_value_heads=4)
    setup = replace(setup_for("llama"), config=config, dtype=dtype)
    rows = rows_for(setup)
    assert simulate(setup, rows).memory.above_weights == pytest.approx(measured(setup, rows), rel=CLOSE)


def test_grouped_products_of_experts_are_counted() -> None:
    def flops(per_token: int) -> int:
        sizes = {**SIZES, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": per_token}
        config = MixtralConfig(**sizes, num_key_value_heads=4)
        return simulate(replace(setup_for("llama", None), config=config), rows_for(setup_for("llama"))).flops

    # One expert more for each of 4 x 64 tokens: three matrices, forward and both gradients, in two blocks.
    assert flops(2) - flops(1) == 2 * 3 * 3 * 2 * 4 * 64 * SIZES["hidden_size"] * SIZES["intermediate_size"]


def test_routing_by_values_is_refused_with_what_to_do() -> None:
    config = MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=4, num_key_value_heads=4)
    config._experts_implementation = "eager"
    with pytest.raises(ModelError, match="max_steps 1"):
        simulate(replace(setup_for("llama"), config=config), rows_for(setup_for("llama")))
