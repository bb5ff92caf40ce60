"""The largest micro-batch that fits, and cards."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from lorakit.errors import ConfigError
from lorakit.methods import find_method
from lorakit.training.config import TrainConfig
from lorakit.training.costs import (
    Memory,
    Setup,
    choose_micro_batch,
    fitting_micro_batch,
    num_cards,
    read_size,
    simulate,
    surely_fits,
)
from lorakit.training.costs.fit_memory import MARGIN, fits
from lorakit.training.data.encode import EncodedRow
from lorakit.training.fitting import choose_recompute
from lorakit.training.memory import free_bytes, machine_bytes
from lorakit.training.plan import Plan
from lorakit.training.recipe import Recipe
from lorakit.training.spec import TaskSpec


@pytest.mark.parametrize(
    ("batch", "free", "expected"),
    [
        (8, 1000, (8, 1)),
        (8, 50, (4, 2)),
        (8, 47, (4, 2)),
        (8, 45, (3, 3)),
        (8, 24, (2, 4)),
        (8, 12, (1, 8)),
        (1, 5, (1, 1)),
    ],
)
def test_the_largest_micro_batch_that_fits_is_chosen(batch: int, free: int, expected: tuple[int, int]) -> None:
    assert choose_micro_batch(lambda rows: 10 * rows, batch, free) == expected


@pytest.mark.parametrize("batch", range(1, 40))
def test_a_chosen_micro_batch_fits_and_fewer_passes_would_not(batch: int) -> None:
    free = 120
    micro, passes = choose_micro_batch(lambda rows: 10 * rows, batch, free)
    assert fits(10 * micro, free)
    assert micro * passes >= batch
    assert passes == 1 or not fits(10 * -(-batch // (passes - 1)), free)


def test_few_sizes_are_tried() -> None:
    tried: list[int] = []

    def needed(rows: int) -> int:
        tried.append(rows)
        return rows

    choose_micro_batch(needed, 256, 40)
    assert len(tried) <= 7


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("512mb", 512e6), ("1.5T", 1.5e12), ("80g", 80e9)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert read_size(text) == int(size)


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="80GB"):
        read_size(text)


def test_logits_are_whole_on_one_card_and_the_rest_is_spread() -> None:
    memory = Memory(weights=100, activations=20, logits=10)
    assert num_cards(memory, int(MARGIN * 131)) == 1
    assert num_cards(memory, int(MARGIN * 71)) == 2
    assert num_cards(memory, 10) is None


def test_free_memory_is_less_than_all() -> None:
    free, everything = free_bytes(torch.device("cpu")), machine_bytes()
    assert free is not None
    assert everything is not None
    assert 0 < free <= everything


CONFIG = LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=172, num_attention_heads=4, num_hidden_layers=2, pad_token_id=0
)
NUM_PARAMETERS = 200_000
TOKENS = 64


def setup_and_rows() -> tuple[Setup, list[EncodedRow]]:
    """Return LoRA on a small LLaMA with a batch of eight rows."""
    plan, lora = Plan(10, 8, 8, 1e-3), find_method("lora")
    setup = Setup(CONFIG, torch.float32, TaskSpec("language-modeling", max_length=TOKENS), lora, {"seed": 0}, plan)
    return setup, [EncodedRow([5] * TOKENS, [5] * TOKENS, i, "", "") for i in range(8)]


def test_the_chosen_micro_batch_fits_as_simulated_and_the_next_does_not() -> None:
    setup, rows = setup_and_rows()
    free = int(MARGIN * simulate(setup, rows[:4]).memory.total) + 1
    assert fitting_micro_batch(setup, rows, 8, free) == (4, 2)
    assert fitting_micro_batch(setup, rows, 8, free - 2) == (3, 3)


def test_what_surely_fits_is_above_the_simulated_memory() -> None:
    setup, rows = setup_and_rows()
    needed = simulate(setup, rows).memory.total
    assert surely_fits(CONFIG, NUM_PARAMETERS, 8, TOKENS, 2**30)
    assert not surely_fits(CONFIG, NUM_PARAMETERS, 8, TOKENS, 2 * needed)


def recompute_of(free: int | None, **settings: object) -> tuple[bool, list[str]]:
    """Return whether a batch of eight rows would be made again, and what the recipe says of it."""
    recipe = Recipe(batch_size=8, micro_batch=8)
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    choose_recompute(config, recipe, CONFIG, NUM_PARAMETERS, TOKENS, free)
    return recipe.recompute, [choice.reason for choice in recipe.choices if choice.name == "recompute"]


def test_activations_are_made_again_where_memory_is_not_ample() -> None:
    assert recompute_of(2**30) == (False, [])
    assert recompute_of(None) == (False, [])
    on, reasons = recompute_of(2**24)
    assert on
    assert reasons == ["of 0.0 GiB free a step could take more than a quarter"]
    assert recompute_of(2**24, micro_batch=8)[0]
    assert recompute_of(2**24, compile=True) == (False, [])  # its compiler decides that


@pytest.mark.parametrize("word", ["on", "off"])
def test_making_activations_again_can_be_asked_for(word: str) -> None:
    free = 2**30 if word == "on" else 2**24
    assert recompute_of(free, recompute=word) == (word == "on", ["as asked"])
