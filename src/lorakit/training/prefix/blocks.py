"""``Prefix``: a model's frozen lowest blocks, and how to leave them out of a pass.

What such a block computes is a function of the row alone: nothing that is trained comes before it. While the hidden
states that leave the last of them are known, every one of them answers with these at once; the model goes on above as
ever. Embeddings, masks and positions are made by the model itself in each pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Prefix:
    """The frozen lowest blocks of a model.

    Attributes:
        path: of the list they are in.
        blocks: they themselves, in the order they are run.
        num_blocks: how many the list has.
        num_others: a block returns a tuple of hidden states and so many things that no other reads; None: the states
            alone.
        width: of the hidden states.
        dtype: of the hidden states.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    num_blocks: int
    num_others: int | None
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        """Say which blocks they are, and what comes before them."""
        above = len(self.blocks)
        until = f"block {above} of the" if above < self.num_blocks else "the end of the"
        return f"what comes before {until} {self.num_blocks} in '{self.path}'"

    @torch.no_grad()
    def states_of(self, run: Callable[[], object]) -> Tensor:
        """Return what the last of the blocks gives in a pass, ``[S, T, width]``; the pass ends there.

        Args:
            run: runs the model.

        Raises:
            ConfigError: the blocks were not run.
        """

        def reached(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            raise _Reached(hidden_of(out))

        hook = self.blocks[-1].register_forward_hook(reached)
        try:
            run()
        except _Reached as found:
            return found.states
        finally:
            hook.remove()
        raise ConfigError(f"cache_prefix: {self} is not run in every pass. Leave cache_prefix out.")

    @contextlib.contextmanager
    def answering(self, states: Tensor) -> Iterator[None]:
        """Within the block the blocks compute nothing: each gives ``states``, ``[S, T, width]``."""
        answer = states if self.num_others is None else (states, *[None] * self.num_others)
        for block in self.blocks:
            block.__dict__["forward"] = lambda *args, **kwargs: answer
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]


class _Reached(Exception):  # noqa: N818
    """Ends a pass where no more of it is needed."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def hidden_of(out: Any) -> Tensor:
    """Return the hidden states of what a block has returned."""
    found = out if isinstance(out, Tensor) else out[0]
    assert isinstance(found, Tensor)
    return found


def joined(found: Sequence[Tensor], places: Sequence[tuple[int, int]], shape: torch.Size) -> Tensor:
    """Put rows' states, ``[tokens, width]`` each, at their places in a batch; the padding's are zeros.

    Args:
        found: of each row.
        places: the sequence that a row is in, and where it begins there.
        shape: ``[S, T]`` of the batch.

    Returns:
        ``[S, T, width]``.
    """
    states = found[0].new_zeros(*shape, found[0].shape[-1])
    for (sequence, start), row in zip(places, found, strict=True):
        states[sequence, start : start + len(row)] = row
    return states
