"""What a forward pass may leave out where nothing but the loss of the supervised tokens is wanted.

All are tried on the model itself before the first step, on rows of a few tokens, and taken only where the scores of
the supervised tokens, the loss and its gradient stay what they are. A model that computes its scores another way is
trained without them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorakit.kernels.head_loss import Curve, head_loss
from lorakit.training.tasks.cross_entropy import summed_cross_entropy

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest root mean square of the difference, as a share of the scores'.

The same products are summed in another order, through all blocks; a bf16 value has 8 bits. Scores at other positions,
or of tokens that see the padding, differ by their own size.
"""
CURVE_TOLERANCE = 1e-5
"""Likewise for what a model makes of given scores: a few operations in fp32."""
WIDEST = 30.0
"""Scores that a model is shown lie between this and its negative; usual ones do."""
SMALL, LARGE = 2.0**-14, 2.0**20
"""Of so small a score a bounded curve shows its slope (to 1e-9), of so large a one its bound."""


@dataclass(frozen=True)
class Shortcuts:
    """What is left out.

    Attributes:
        supervised_only: the head multiplies the supervised positions alone, not those of prompts and padding.
        without_mask: there is no attention mask: padding stands behind the tokens, and a causal model's tokens see
            only what is before them. Attention kernels are faster without one.
        curve: what the model makes of its head's scores, where the head is not run but its loss is made in pieces
            from the hidden states (``kernels/head_loss.py``); None: the model computes all the scores itself.
    """

    supervised_only: bool = False
    without_mask: bool = False
    curve: Curve | None = None


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
        return rows_at(args[0], places)[None], *args[1:]

    head = head_of(model)
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def before_head(head: nn.Linear, places: Tensor, shape: tuple[int, int]) -> Iterator[list[Tensor]]:
    """Take the hidden states at ``places`` of ``[B, T]``, flattened, in place of running the head.

    The list that is given holds them, ``[N, width]``, once the head was asked for ``[B, T, width]``; it has answered
    with the scores of no position, ``[1, 0, words]``. It is empty if that never happened: the head was run as ever.
    """
    found: list[Tensor] = []

    def answer(hidden: Tensor) -> Tensor:
        if found or tuple(hidden.shape[:-1]) != shape:
            return nn.Linear.forward(head, hidden)
        found.append(rows_at(hidden, places))
        return hidden.new_empty(1, 0, head.out_features)

    with _answering(head, answer):
        yield found


@contextlib.contextmanager
def _answering(head: nn.Linear, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``answer`` stand in for the head's own forward."""
    head.__dict__["forward"] = answer
    try:
        yield
    finally:
        del head.__dict__["forward"]


def rows_at(hidden: Tensor, places: Tensor) -> Tensor:
    """Return ``[N, width]`` of ``[B, T, width]``."""
    return hidden.flatten(0, 1).index_select(0, places)


def head_of(model: Any) -> nn.Module | None:
    """Return the module that turns hidden states into scores of words, where the model says which it is."""
    found = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    return found if isinstance(found, nn.Module) else None


def frozen_head(model: Any) -> nn.Linear | None:
    """Return the head if it is a product with a frozen weight and nothing else.

    It is not if an adapter or a quantiser gave it a class or a weight of another kind, if any of it is trained, or if
    hooks look at it or stand in for it.
    """
    head = head_of(model)
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    weight: Any = head.weight
    if is_traceable_wrapper_subclass(weight):
        return None
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return None if any(hooks) or any(parameter.requires_grad for parameter in head.parameters()) else head


def curve_of(head: nn.Linear, places: Tensor, shape: tuple[int, int], run: Callable[[], Tensor]) -> Curve | None:
    """Find out what the model makes of its head's scores, by showing it scores that are known.

    Args:
        head: the model's.
        places: positions to show, of ``[B, T]`` flattened.
        shape: ``[B, T]``.
        run: runs the model and returns its logits.

    Returns:
        The curve; None if it is no :class:`Curve`, or not the same for all words and positions.
    """
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    count = len(places) * head.out_features
    shown = torch.linspace(-WIDEST, WIDEST, count, dtype=dtype, device=head.weight.device)
    # Neighbours get unlike scores, and the order is no position's or word's own.
    shown = shown[torch.arange(count, device=shown.device) * _coprime(count) % count]
    shown[:3] = torch.tensor([0.0, SMALL, LARGE], dtype=dtype)
    scores = shown.view(1, len(places), head.out_features)

    def answer(hidden: Tensor) -> Tensor:
        return scores.clone() if tuple(hidden.shape[:-1]) == shape else nn.Linear.forward(head, hidden)

    with _answering(head, answer):
        logits = run()
    if logits.shape != scores.shape:
        return None
    small, large = logits.flatten()[1:3].tolist()
    factor = small / SMALL
    bounded = abs(large) < abs(factor) * LARGE / 2
    curve = Curve(factor, large if bounded else None)
    if factor <= 0 or large <= 0:
        return None
    found, expected = logits.flatten()[3:].double(), curve(scores.flatten()[3:].double())
    same = (found - expected).norm() <= CURVE_TOLERANCE * expected.norm()
    return curve if bool(same) and float(logits.flatten()[0]) == 0.0 else None


def same_loss(
    head: nn.Linear, curve: Curve, hidden: Tensor, truth: Tensor, shape: tuple[int, int], run: Callable[[], Tensor]
) -> bool:
    """Tell whether loss and gradient without the model's own scores are those of the model's own.

    Args:
        head: the model's.
        curve: what the model makes of its scores.
        hidden: what goes into the head at some positions, ``[N, width]``.
        truth: the right words there, ``[N]``.
        shape: ``[B, T]`` of all positions.
        run: runs the model and returns its logits.
    """
    with torch.enable_grad():
        ours, own = hidden.detach().requires_grad_(), hidden.detach().requires_grad_()

        def answer(given: Tensor) -> Tensor:
            return nn.Linear.forward(head, own[None] if tuple(given.shape[:-1]) == shape else given)

        with _answering(head, answer):
            logits = run()
        losses = head_loss(ours, head.weight, head.bias, truth, curve), summed_cross_entropy(logits[0], truth)
        found, expected = (torch.autograd.grad(*pair)[0] for pair in zip(losses, (ours, own), strict=True))
    found_loss, expected_loss = (loss.detach().to(hidden.dtype) for loss in losses)
    return alike(found_loss, expected_loss) and alike(found, expected)


def _coprime(count: int) -> int:
    """Return a step that visits all of ``count`` places, about 0.618 of them at a time."""
    step = max(1, int(count * 0.618))
    while math.gcd(step, count) != 1:
        step += 1
    return step


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
        "curve": "its scores are all held at once, because it does more to them than scale or cap them",
    }
    missed = [text for name, text in words.items() if getattr(possible, name) and not getattr(found, name)]
    return f"The model computes its scores another way than most: {'; '.join(missed)}." if missed else None
