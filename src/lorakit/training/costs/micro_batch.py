"""How many rows at a time: the most that fit, by simulation where a coarse bound does not settle it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.training.costs.extend import cost_of
from lorakit.training.costs.fit_memory import choose_micro_batch
from lorakit.training.costs.simulate import Setup
from lorakit.training.data.encode import EncodedRow

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AMPLE = 4
"""How far below the free memory the coarse bound must lie to be believed without a simulation."""


def fitting_micro_batch(
    setup: Setup, longest: Sequence[EncodedRow], batch_size: int, free_bytes: int
) -> tuple[int, int]:
    """Return the largest micro-batch whose simulated step fits, weights included, and how many make a batch.

    Args:
        setup: what is trained.
        longest: the rows of the longest batch, longest first.
        batch_size: rows per optimizer step.
        free_bytes: for the base and everything above it; where the base is loaded already, its bytes count as free.

    Raises:
        ModelError: the model cannot be simulated.
    """

    def needed(micro: int) -> int:
        return cost_of(setup, longest[:micro]).memory.total

    return choose_micro_batch(needed, min(batch_size, len(longest)), free_bytes)


def surely_fits(config: PretrainedConfig, num_parameters: int, num_rows: int, num_tokens: int, free_bytes: int) -> bool:
    """Tell in no time whether a step is far from filling the memory, so that no simulation is needed.

    All activations of a block take ``s b h (34 + 5 a s / h)`` bytes in 16 bits (Korthikanti et al. 2022, arXiv
    2205.05198, eq. 1), twice that in 32; logits take 16 bytes a word with the loss's copies; and the parameters 16
    each with gradients and AdamW, were they all trained.
    """
    inner = config.get_text_config()
    hidden, blocks, heads = inner.hidden_size, inner.num_hidden_layers, inner.num_attention_heads
    tokens = num_rows * num_tokens
    activations = 2 * tokens * blocks * (34 * hidden + 5 * heads * num_tokens)
    logits = 16 * tokens * int(inner.vocab_size)
    return bool(AMPLE * (activations + logits + 16 * num_parameters) < free_bytes)
