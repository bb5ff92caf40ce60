"""Published facts of memory, as tests of the arithmetic.

Sizes: LLaMA (Touvron et al. 2023, arXiv 2302.13971, table 2), LLaMA-2 7B's config, BLOOM-176B (Scao et al. 2022,
arXiv 2211.05100, table 3). Hardware: those of LoRA fine-tuning in 16 bits on cards of 80 GB.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BloomConfig, LlamaConfig, PretrainedConfig

from lorakit.methods import find_method
from lorakit.training.costs import Cost, Setup, cost_of, four_bit, num_cards
from lorakit.training.costs.columns import Base, Column, base_of
from lorakit.training.costs.parts import Ledger
from lorakit.training.data.encode import EncodedRow
from lorakit.training.plan import Plan
from lorakit.training.spec import TaskSpec

CARD = 80 * 10**9
TOKENS = 512
LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}


def setup_of(config: PretrainedConfig) -> Setup:
    """Return LoRA of rank 8 on q and v in bf16, with gradient checkpointing."""
    plan = Plan(1, 1, 1, 1e-3, dtype="bf16", grad_checkpointing=True)
    targets = {"targets": ["q_proj", "v_proj"], "seed": 0}
    lora = find_method({"name": "lora", "rank": 8})
    return Setup(config, torch.bfloat16, TaskSpec("language-modeling", max_length=TOKENS), lora, targets, plan)


@functools.cache
def llama(name: str) -> tuple[Base, Cost]:
    """Return size and cost of a LLaMA."""
    width, inner, blocks, heads = LLAMA[name]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        vocab_size=32000,
    )
    row: Any = EncodedRow([5] * TOKENS, [5] * TOKENS, 1, "", "")
    return base_of(setup_of(config)), cost_of(setup_of(config), [row])


def test_a_square_matrix_of_4096_in_fp32_is_64_mebibytes() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        ledger.begin("update")
        matrix = torch.empty(4096, 4096)
        assert matrix.shape == (4096, 4096)
    assert ledger.peaks(0).update.activations == 64 * 2**20


@pytest.mark.parametrize(
    ("name", "count"),
    [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("30B", 32_528_943_616), ("65B", 65_285_660_672)],
)
def test_llama_has_its_published_number_of_parameters(name: str, count: int) -> None:
    assert llama(name)[0].num_parameters == count


def test_lora_of_rank_8_on_q_and_v_of_7b_trains_four_million() -> None:
    assert llama("7B")[1].num_trainable == 4_194_304 == 32 * 2 * 8 * (4096 + 4096)


@pytest.mark.parametrize(("name", "cards"), [("7B", 1), ("13B", 1), ("30B", 1), ("65B", 2)])
def test_llama_with_lora_needs_as_many_cards_of_80_gb(name: str, cards: int) -> None:
    assert num_cards(llama(name)[1].memory, CARD) == cards


def test_weights_of_the_cost_are_the_parameters_in_16_bits() -> None:
    base, cost = llama("7B")
    # Rotary frequencies are buffers beside them: 64 numbers, kept twice.
    assert 0 <= cost.memory.weights - 2 * base.num_parameters < 2048


def test_65b_in_four_bits_fits_into_48_gb() -> None:
    base, cost = llama("65B")
    memory = four_bit(Column("lora, 4-bit base", memory=cost.memory), base).memory
    assert memory is not None
    assert memory.total < 48 * 10**9  # Dettmers et al. 2023, abstract


def test_bloom_176b_takes_some_350_gb_in_16_bits() -> None:
    config = BloomConfig(hidden_size=14336, n_layer=70, n_head=112, vocab_size=250880)
    base = base_of(setup_of(config))
    assert base.num_parameters == 176_247_271_424
    assert 350e9 < 2 * base.num_parameters < 355e9
