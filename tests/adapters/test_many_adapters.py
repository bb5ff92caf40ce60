"""What loading, choosing and removing cost with many adapters there: counted, not timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import Handle, walk
from lorakit.adapters.attached import freeze_base

MANY = 12


class Block(nn.Module):
    """Two linear layers, so that paths have several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both."""
        return x + self.down(torch.relu(self.up(x)))


def a_model() -> nn.Module:
    """Return three blocks with a tied weight and a shared module."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    model.again = model.blocks[0]
    model.head = nn.Linear(10, 6, bias=False)
    model.head.weight = model.blocks[1].down.weight
    return model


def num_calls(act: Callable[[], Any]) -> int:
    """Count the calls of Python functions that an action makes."""
    count = 0

    def seen(frame: FrameType, event: str, value: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of an adapter of two blocks."""
    handle = lk.attach(nn.Sequential(Block(), Block()), lk.LoRA(rank=2), seed=0)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.normal_()
    lk.save(handle, tmp_path / "adapter")
    return tmp_path / "adapter"


def loaded(folder: Path, number: int) -> Handle:
    """Load an adapter so many times onto one model."""
    model = nn.Sequential(Block(), Block())
    for i in range(number):
        handle = lk.load(model, folder, f"a{i}", check_base=False)
    return handle


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda handle, folder: lk.load(handle.model, folder, "new", check_base=False), id="load"),
        pytest.param(lambda handle, folder: handle.add("new", lk.LoRA(rank=2), seed=0), id="add"),
        pytest.param(lambda handle, folder: handle.use("a1"), id="use"),
        pytest.param(lambda handle, folder: handle.use({"a0": 1.0, "a1": 0.5}), id="use_two"),
        pytest.param(lambda handle, folder: handle.remove("a1"), id="remove"),
        pytest.param(lambda handle, folder: handle.identity("a1"), id="identity"),
        pytest.param(lambda handle, folder: handle.state("a1"), id="state"),
    ],
)
def test_an_action_makes_as_many_calls_among_many_adapters_as_among_few(
    saved: Path, act: Callable[[Handle, Path], Any]
) -> None:
    few, many = loaded(saved, 2), loaded(saved, MANY)
    act(loaded(saved, 2), saved)  # what is computed once for a process
    assert num_calls(lambda: act(many, saved)) == num_calls(lambda: act(few, saved))


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_a_walk_through_a_plain_model_is_torchs_own(remove_duplicate: bool) -> None:
    model = a_model()
    assert list(walk.walk(model, remove_duplicate)) == list(model.named_modules(remove_duplicate=remove_duplicate))


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_a_walk_through_parameters_is_torchs_own(remove_duplicate: bool) -> None:
    model = a_model()
    found = [(name, id(parameter)) for name, parameter in walk.walk_parameters(model, remove_duplicate)]
    expected = model.named_parameters(remove_duplicate=remove_duplicate)
    assert found == [(name, id(parameter)) for name, parameter in expected]


def test_a_walk_sees_nothing_of_adapters() -> None:
    model = a_model()
    before = [path for path, _ in walk.walk(model)]
    lk.attach(model, lk.LoRA(rank=2), ["up"])
    assert [path for path, _ in walk.walk(model)] == before


def test_module_at_is_get_submodule() -> None:
    model = a_model()
    paths = [path for path, _ in model.named_modules()]
    assert [walk.module_at(model, path) for path in paths] == [model.get_submodule(path) for path in paths]


def test_freezing_leaves_adapters_that_train_alone() -> None:
    model = nn.Sequential(Block())
    handle = lk.attach(model, lk.LoRA(rank=2))
    freeze_base(model)
    assert all(parameter.requires_grad for parameter in handle.parameters().values())


@pytest.mark.parametrize("change", ["in_place", "data", "replaced"])
def test_a_base_that_changed_between_two_loads_is_refused(tmp_path: Path, change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    handle = lk.attach(model, lk.LoRA(rank=2), seed=0)
    lk.save(handle, tmp_path / "adapter")
    lk.load(model, tmp_path / "adapter", "before")
    layer = model[1].down
    if change == "in_place":
        with torch.no_grad():
            layer.weight.add_(1.0)
    elif change == "data":
        layer.weight.data += 1.0
    else:
        layer.weight = nn.Parameter(layer.weight.detach() + 1.0)
    with pytest.raises(lk.LorakitError, match="other weights"):
        lk.load(model, tmp_path / "adapter", "after")


def test_a_loaded_adapter_owns_its_memory(saved: Path) -> None:
    handle = loaded(saved, 1)
    before = {name: parameter.clone() for name, parameter in handle.parameters().items()}
    file = saved / "adapter_model.safetensors"
    with file.open("r+b") as stream:  # another program writes over the file in place
        stream.seek(file.stat().st_size - 64)
        stream.write(b"\xff" * 64)
    assert all(torch.equal(parameter, before[name]) for name, parameter in handle.parameters().items())
