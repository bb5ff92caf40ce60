"""A model's repeated blocks through ``torch.compile``, for the steps of a training and nothing else.

The blocks of a list are alike, so what is compiled for one serves all of them: the time that compiling takes does not
grow with their number. Lengths and numbers of rows stay open, so batches of other sizes need no other kernels. The
model around the blocks runs as ever, with its head on supervised positions alone; evaluations, samples and what is
saved do not know of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError, first_line
from lorakit.training.data.encode import EncodedRow
from lorakit.training.prefix.find import block_lists
from lorakit.training.randomness import Randomness
from lorakit.training.tasks import Task

MOST_KERNELS = 32
"""Variants of one block's code: with and without a gradient to its input, a mask, a single row."""

TRIED = 24
"""Tokens in the longer one of the two rows that the blocks are compiled for."""

TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the gradients of a step may be from those without the compiler, over their norm; else ``1e-3``."""

COMPILING = "The model's blocks are compiled first; that can take a minute."
OUT = "Leave compile out."


class CompiledBlocks:
    """The blocks of a model and what the compiler makes of them.

    Attributes:
        blocks: those that are compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the blocks; they are compiled when they are first run.

        Raises:
            ConfigError: the model has no list of blocks.
        """
        lists = [list(blocks) for blocks in block_lists(model).values() if len({type(b) for b in blocks}) == 1]
        self.blocks = [block for blocks in lists for block in blocks]
        if not self.blocks:
            raise ConfigError(f"compile: {type(model).__name__} has no list of blocks that are alike. Leave it out.")
        self._calls: list[Callable[..., Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it, calling a block runs what was compiled."""
        if not self._calls:  # random numbers come from torch's generator, as without the compiler
            how: Any = {"dynamic": True, "options": {"fallback_random": True}}
            self._calls = [torch.compile(block._call_impl, **how) for block in self.blocks]
        for block, call in zip(self.blocks, self._calls, strict=True):
            block._compiled_call_impl = call
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_KERNELS):
                yield
        finally:
            for block in self.blocks:
                del block._compiled_call_impl

    def try_out(
        self,
        loss: Callable[[Sequence[EncodedRow]], Tensor],
        rows: Sequence[EncodedRow],
        parameters: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        """Compile the blocks and compare a step's gradients with those of the blocks as they are.

        Args:
            loss: runs the model on rows.
            rows: those of :func:`shown`; always of the same lengths, so that kernels do not depend on where a run
                begins.
            parameters: what is trained.
            device: whose random numbers are drawn; they are left as they were.

        Raises:
            ConfigError: the compiler fails, or computes something else.
        """
        before = Randomness.now(device)
        expected = _gradient(loss(rows), parameters)
        drawn = not Randomness.now(device).same(before)
        before.restore(device)
        try:
            with self.running():
                found = _gradient(loss(rows), parameters)
        except RuntimeError as error:
            reason = first_line(error).rstrip(".")
            raise ConfigError(f"compile: the model's blocks cannot be compiled: {reason}. {OUT}") from error
        before.restore(device)
        if drawn:  # masks of dropout are not those of the other path
            return
        distance, size = float((found - expected).norm()), float(expected.norm())
        if not distance <= TOLERANCES.get(next(self.blocks[0].parameters()).dtype, 1e-3) * size:
            raise ConfigError(
                f"compile: the compiled blocks give other gradients ({distance:.2g} of {size:.2g}). {OUT}"
            )


def shown(rows: Sequence[EncodedRow], task: Task) -> list[EncodedRow]:
    """Return two rows of fixed lengths, no longer than the task's, made of the longest one's tokens."""
    row = max(rows, key=lambda row: row.length)
    long = min(TRIED, task.spec.max_length)
    return [_of_length(row, long), _of_length(row, long * 2 // 3)]


def _of_length(row: EncodedRow, length: int) -> EncodedRow:
    """Return a row whose tokens are spread over a length, so that some of those that are learned are there."""

    def spread(tokens: list[int]) -> list[int]:
        return [tokens[i * len(tokens) // length] for i in range(length)]

    types = None if row.token_type_ids is None else spread(row.token_type_ids)
    labels = spread(row.labels) if isinstance(row.labels, list) else row.labels
    return replace(row, input_ids=spread(row.input_ids), labels=labels, token_type_ids=types)


def check_compiler(device: str) -> None:
    """Refuse, before any long work, where the CPU's compiler is missing.

    Raises:
        ConfigError: there is none.
    """
    if device != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise ConfigError(
            "compile needs a C++ compiler on a CPU, and none was found: install g++ or clang (or set CXX). " + OUT
        ) from None


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradients of all parameters as one vector, zeros where there is none."""
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).float().flatten() for g, p in zip(found, parameters, strict=True)]
    )
