"""Kinds of training side by side: in full, the head alone, the method asked for, and that on a 4-bit base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.methods import find_method
from lorakit.training.costs.extend import cost_of
from lorakit.training.costs.parts import Memory
from lorakit.training.costs.simulate import Cost, Setup, build
from lorakit.training.data.encode import EncodedRow

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits per weight in NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314, section 3).

Four bits, an 8-bit scale for each 64 weights, and a 32-bit scale for each 256 of those: 4.127.
"""


@dataclass(frozen=True)
class Column:
    """One kind of training.

    Attributes:
        name: 'full', 'head', the method's, or that with ', checkpointing' or ', 4-bit base'.
        num_trainable: numbers that are trained.
        memory: at the peak of a step; None where this kind cannot be, which ``refused`` says why.
        flops: of one micro-batch.
        adapter_bytes: of the file that training leaves.
        checkpoint_bytes: of one checkpoint: what is trained, and the optimizer's state.
        refused: why not.
    """

    name: str
    num_trainable: int = 0
    memory: Memory | None = None
    flops: int = 0
    adapter_bytes: int = 0
    checkpoint_bytes: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Base:
    """The base's size.

    Attributes:
        num_parameters: numbers in it, tied ones once.
        num_linear: those of the linear layers that a 4-bit base quantises: all but the output layer.
        largest_linear: of the largest of these, which is made whole for its product.
    """

    num_parameters: int
    num_linear: int
    largest_linear: int


def skeleton(setup: Setup) -> Any:
    """Build the base without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return build(setup)


def base_of(setup: Setup) -> Base:
    """Build the base without memory and count its numbers."""
    from transformers.pytorch_utils import Conv1D

    model = skeleton(setup)
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None
    heads = ("classifier", "score", "lm_head")
    sizes = [
        module.weight.numel()
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and path.split(".")[0] not in heads
    ]
    return Base(sum(p.numel() for p in model.parameters()), sum(sizes), max(sizes, default=0))


def columns_of(setup: Setup, rows: Sequence[EncodedRow], base: Base) -> tuple[Column, ...]:
    """Simulate every kind on the micro-batch ``rows``; the third is the method asked for.

    Raises:
        InputError: the method asked for cannot be attached, or the model not be simulated.
    """
    assert setup.method is not None
    name = setup.method.name
    beside = [module for module in setup.attaching["train_modules"] if not module.endswith("]")]  # a head has its rows
    only_modules = {"seed": setup.attaching["seed"], "train_modules": beside}
    asked = _column(name, cost_of(setup, rows))
    found = [
        _tried("full", replace(setup, method=None), rows),
        _tried("head", replace(setup, method=find_method("head"), attaching=only_modules), rows),
        asked,
    ]
    if not setup.plan.grad_checkpointing:
        found.append(
            _tried(f"{name}, checkpointing", replace(setup, plan=replace(setup.plan, grad_checkpointing=True)), rows)
        )
    half = replace(setup, dtype=torch.bfloat16, plan=replace(setup.plan, dtype="bf16"))
    found.append(four_bit(_tried(f"{name}, 4-bit base", half, rows), base))
    return tuple(found)


def four_bit(column: Column, base: Base) -> Column:
    """Return a 16-bit column with its linear weights in 4 bits, and one of them whole for the moment it is used."""
    if column.memory is None:
        return column
    saved = base.num_linear * 2 - round(base.num_linear * NF4_BITS / 8)
    memory = replace(
        column.memory,
        weights=column.memory.weights - saved,
        activations=column.memory.activations + 2 * base.largest_linear,
    )
    return replace(column, memory=memory)


def _tried(name: str, setup: Setup, rows: Sequence[EncodedRow]) -> Column:
    try:
        return _column(name, cost_of(setup, rows))
    except (InputError, ValueError) as error:
        return Column(name, refused=str(error))


def _column(name: str, cost: Cost) -> Column:
    checkpoint = cost.saved_bytes + cost.state_bytes
    return Column(name, cost.num_trainable, cost.memory, cost.flops, cost.saved_bytes, checkpoint)
