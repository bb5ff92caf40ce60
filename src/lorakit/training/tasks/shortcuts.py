"""What a forward pass may leave out where nothing but the loss of the supervised tokens is wanted.

Both are tried on the model itself before the first step, on rows of a few tokens, and taken only where the scores of
the supervised tokens stay what they are. A model that computes its scores another way is trained without them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest root mean square of the difference, as a share of the scores'.

The same products are summed in another order, through all blocks; a bf16 value has 8 bits. Scores at other positions,
or of tokens that see the padding, differ by their own size.
"""


@dataclass(frozen=True)
class Shortcuts:
    """What is left out.

    Attributes:
        supervised_only: the head multiplies the supervised positions alone, not those of prompts and padding.
        without_mask: there is no attention mask: padding stands behind the tokens, and a causal model's tokens see
            only what is before them. Attention kernels are faster without one.
    """

    supervised_only: bool = False
    without_mask: bool = False


NONE = Shortcuts()


@contextlib.contextmanager
def head_at(model: nn.Module, places: Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Let the model's head see the positions ``places`` of ``[B, T]``, flattened, as one row ``[1, N]``.

    Everything that the model does to the head's input or output is done as ever, to fewer positions. A head that is
    given anything else than ``[B, T, width]`` is left alone.
    """

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or tuple(args[0].shape[:-1]) != shape:
            return None
        return args[0].flatten(0, 1).index_select(0, places)[None], *args[1:]

    head = head_of(model)
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


def head_of(model: Any) -> nn.Module | None:
    """Return the module that turns hidden states into scores of words, where the model says which it is."""
    found = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    return found if isinstance(found, nn.Module) else None


def alike(found: Tensor, expected: Tensor) -> bool:
    """Tell whether scores are the same but for rounding."""
    if found.shape != expected.shape:
        return False
    difference, size = (found.float() - expected.float()).norm(), expected.float().norm()
    return bool(difference <= TOLERANCES.get(expected.dtype, 0.0) * size)


def explained(found: Shortcuts, possible: Shortcuts) -> str | None:
    """Return what to tell of shortcuts that did not stand the trial, or None if all did."""
    words = {
        "supervised_only": "its scores are computed at all positions, also where no token is learned",
        "without_mask": "its attention is masked, because tokens would see the padding behind them",
    }
    missed = [text for name, text in words.items() if getattr(possible, name) and not getattr(found, name)]
    return f"The model computes its scores another way than most: {'; '.join(missed)}." if missed else None
