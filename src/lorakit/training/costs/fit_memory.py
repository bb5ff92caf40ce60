"""How much fits: the largest micro-batch for a memory, and how many cards a training needs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from lorakit.errors import ConfigError
from lorakit.training.costs.parts import Memory

MARGIN = 1.15
"""What is kept free above an estimate.

The estimate counts tensors. Allocators round up and leave gaps, matrix libraries take workspaces, and a GPU's kernels
differ from those simulated: 15 % is the accuracy that the estimate is held to.
"""

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def read_size(text: str) -> int:
    """Read a memory's size: '80GB' is 80e9 bytes, '80GiB' is 80 * 2**30.

    Raises:
        ConfigError: it is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)b?\s*", text.lower())
    size = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if size <= 0:
        raise ConfigError(f"'{text}' is not a size of memory. Write '80GB' or '24GiB'.")
    return int(size)


def choose_micro_batch(above_weights: Callable[[int], int], batch_size: int, free_bytes: int) -> tuple[int, int]:
    """Return the largest micro-batch that fits, and how many of them make a batch.

    The candidates are ``ceil(batch_size / n)`` for n = 1, 2, ...: of micro-batches that need as many passes, the
    smallest. Memory grows with the rows, so few of them have to be tried.

    Args:
        above_weights: bytes that a step takes above the loaded base, by the rows of its micro-batch.
        batch_size: rows per optimizer step.
        free_bytes: memory that is free once the base is loaded.

    Returns:
        Rows in a micro-batch (1 even where that does not fit), and the number of micro-batches.
    """
    sizes = sorted({-(-batch_size // n) for n in range(1, batch_size + 1)})
    low, high = 0, len(sizes) - 1
    if fits(above_weights(sizes[high]), free_bytes):
        return batch_size, 1
    while low < high:
        middle = (low + high) // 2
        if fits(above_weights(sizes[middle]), free_bytes):
            low = middle + 1
        else:
            high = middle
    micro = sizes[max(low - 1, 0)]
    return micro, -(-batch_size // micro)


def fits(num_bytes: int, free_bytes: int) -> bool:
    """Tell whether an estimate fits with its margin."""
    return num_bytes * MARGIN <= free_bytes


def num_cards(memory: Memory, card_bytes: int) -> int | None:
    """Return how many cards hold a training whose blocks are spread over them evenly; None if none do.

    Weights, adapter, gradients, optimizer and activations are cut by blocks, one card working after the other (a
    plain pipeline); the logits are whole, on the last card. Each card keeps the margin.
    """
    room = card_bytes / MARGIN - memory.logits
    if room <= 0:
        return None
    return max(1, math.ceil((memory.total - memory.logits) / room))
