"""Bytes counted against arithmetic."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from lorakit.training.memory import TensorMemory, machine_bytes, peak_bytes

FLOAT = 4
CPU = torch.device("cpu")


def test_a_chain_of_products_is_counted_to_the_byte() -> None:
    a, b, c = torch.ones(8, 16), torch.ones(16, 32), torch.ones(32, 4)
    memory = TensorMemory()
    with memory:
        first = a @ b
        second = first @ c
    assert memory.now == FLOAT * (first.numel() + second.numel())
    assert memory.peak == memory.now


def test_what_is_freed_is_seen_and_the_peak_stays() -> None:
    a = torch.ones(10, 10)
    memory = TensorMemory()
    with memory:
        big = a.repeat(10, 10)
        del big
        small = a + 1
        assert memory.now == FLOAT * small.numel()
    assert memory.peak == FLOAT * 100 * 100


def test_freed_memory_can_be_used_again_without_a_higher_peak() -> None:
    memory = TensorMemory()
    with memory:
        for _ in range(5):
            made = torch.ones(1000)
            del made
    assert (memory.now, memory.peak) == (0, FLOAT * 1000)


def test_views_and_changes_in_place_take_nothing() -> None:
    a = torch.ones(8, 16)
    memory = TensorMemory()
    with memory:
        a.view(16, 8).t()[2:4].add_(1)
        a.expand(3, 8, 16)
    assert (memory.now, memory.peak) == (0, 0)


def test_tensors_that_were_there_before_are_not_counted_when_freed() -> None:
    memory = TensorMemory()
    old = torch.ones(1000)
    with memory:
        old.mul_(2)
        del old
        gc.collect()
        made = torch.ones(10)
    assert memory.now == FLOAT * made.numel()


def test_an_address_used_again_after_an_old_tensor_counts() -> None:
    memory = TensorMemory()
    with memory:
        for _ in range(50):
            with torch.utils._python_dispatch._disable_current_modes():
                foreign = torch.ones(1000)
            foreign.add_(1)
            del foreign
            made = torch.ones(1000)
            assert memory.now == FLOAT * 1000
            del made


def test_memory_of_other_dtypes_is_in_bytes() -> None:
    memory = TensorMemory()
    with memory:
        kept = [torch.zeros(10, dtype=torch.bfloat16), torch.zeros(10, dtype=torch.int64)]
    assert memory.now == 10 * 2 + 10 * 8
    assert len(kept) == 2


@pytest.mark.parametrize("rows", [1, 64])
def test_a_linear_models_step_is_the_arithmetic(rows: int) -> None:
    d_in, d_out = 32, 48
    layer, x = nn.Linear(d_in, d_out, bias=False), torch.ones(rows, d_in)

    def step() -> None:
        layer(x).sum().backward()

    # Either the output and the loss, or, once the output is gone, the weight's gradient, the loss and its gradient.
    assert peak_bytes(step, CPU) == FLOAT * max(rows * d_out + 1, d_in * d_out + 2)


def test_a_forward_without_gradients_holds_two_layers_at_a_time() -> None:
    layers = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(6)])
    x = torch.ones(8, 16)

    @torch.no_grad()
    def run() -> Tensor:
        found: Tensor = layers(x)
        return found

    assert peak_bytes(run, CPU) == 2 * FLOAT * x.numel()


def test_saved_activations_are_part_of_the_peak() -> None:
    layers = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(6)])
    x = torch.ones(8, 16)
    assert peak_bytes(lambda: layers(x), CPU) == 6 * FLOAT * x.numel()


def test_the_machine_says_how_much_memory_it_has() -> None:
    found = machine_bytes()
    assert found is None or found > 2**28
