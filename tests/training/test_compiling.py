"""A model's blocks compiled for the steps of a training: the same losses, few kernels, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.training.compiling import TRIED, CompiledBlocks, check_compiler, shown
from lorakit.training.data.encode import EncodedRow
from lorakit.training.fit import FitResult, fit, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.spec import TaskSpec

Fit = Callable[..., FitResult]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch itself
FP32 = 1e-5  # fused kernels add in another order


class Losses(Observer):
    """Remembers the losses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def step(self, step: Step) -> None:
        self.found.append(step.loss)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let the compiler do all but make kernels; return the graphs that it was given, in forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[Any] = []
    torch._dynamo.reset()

    def seen(graph: Any, given: Any) -> Any:
        found.append(graph)
        return graph

    whole, original = aot_autograd(fw_compiler=seen, bw_compiler=seen), torch.compile

    def compile_quickly(call: Any, *, dynamic: bool, options: Any) -> Any:
        assert options == {"fallback_random": True}
        return original(call, dynamic=dynamic, backend=whole)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    yield found
    torch._dynamo.reset()


def losses(quick_fit: Fit, kind: str, rows: str, **settings: Any) -> list[float]:
    watched = Losses()
    quick_fit(kind, rows, observer=watched, **{"max_steps": 5, **settings})
    return watched.found


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA in micro-batches": ("llama", "prompted", {"micro_batch": 3}),
    "bf16": ("llama-bf16", "prompted", {"dtype": "bf16"}),
}
SLOW: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DoRA": ("llama", "prompted", {"method": "dora"}),
    "LoRA-FA": ("llama", "prompted", {"method": "lorafa"}),
    "AdaLoRA": ("llama", "prompted", {"method": "adalora"}),
    "in full": ("llama", "prompted", {"method": "full", "lr": 1e-4}),
    "packed": ("llama", "prompted", {"packing": "on"}),
    "checkpointed": ("llama", "prompted", {"grad_checkpointing": True}),
    "a classifier": ("llama", "classified", {}),
}
EACH = [
    *(pytest.param(*case, id=name) for name, case in CASES.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]


@pytest.mark.parametrize(("kind", "rows", "settings"), EACH)
def test_compiled_blocks_learn_the_same(
    kind: str, rows: str, settings: dict[str, Any], quick_fit: Fit, graphs: list[Any]
) -> None:
    expected = losses(quick_fit, kind, rows, **settings)
    assert not graphs
    found = losses(quick_fit, kind, rows, **settings, compile=True)
    assert graphs
    assert found == pytest.approx(expected, rel=2e-3 if "bf16" in kind else FP32)


@pytest.mark.parametrize(
    ("kind", "rows", "settings"),
    [
        ("gpt2", "prompted", {"method": {"name": "lora", "dropout": 0.1}}),
        ("bert", "classified", {}),
        ("t5", "prompted", {}),
    ],
)
@pytest.mark.slow
def test_a_model_that_drops_at_random_learns(
    kind: str, rows: str, settings: dict[str, Any], quick_fit: Fit, graphs: list[Any]
) -> None:
    found = losses(quick_fit, kind, rows, **settings, compile=True, max_steps=20)
    assert graphs
    assert sum(found[-4:]) < sum(found[:4])


def test_blocks_and_lengths_share_kernels_and_are_as_they_were_afterwards(quick_fit: Fit, graphs: list[Any]) -> None:
    model: Any = quick_fit("llama", "prompted", compile=True, max_steps=12, batch_size=3).model
    assert len(model.model.layers) > 1
    # The first block's input takes no gradient; each variant has a forward and a backward graph, and one more where a
    # batch's sizes are alike.
    count = len(graphs)
    assert 4 <= count <= 8
    assert all("_compiled_call_impl" not in vars(block) for block in model.modules())
    model(torch.ones(1, 3, dtype=torch.long))
    assert len(graphs) == count


def test_the_rows_that_kernels_are_made_for_have_fixed_lengths() -> None:
    for length in (3, 10, 100):
        row = EncodedRow(list(range(length)), [-100] * (length // 2) + list(range(length - length // 2)), 1, "", "")
        long, short = shown([row], TaskSpec("generation", max_length=512).kind)
        assert (len(long.input_ids), len(short.input_ids)) == (TRIED, TRIED * 2 // 3)
        assert isinstance(long.labels, list)
        assert len(long.labels) == TRIED
        assert -100 in long.labels
        assert any(label != -100 for label in long.labels)
    assert len(shown([row], TaskSpec("generation", max_length=8).kind)[0].input_ids) == 8


class Flat(nn.Module):
    """Has no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Flat has no list of blocks that are alike\. Leave it out"):
        CompiledBlocks(Flat())


def test_a_missing_compiler_is_told_before_anything_is_written(
    quick_fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> None:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on a CPU, and none was found: install"):
        quick_fit("llama", "prompted", compile=True, output=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    check_compiler("cuda")


def test_making_again_is_not_combined_with_compiling(quick_fit: Fit) -> None:
    with pytest.raises(ConfigError, match=r"recompute 'on' and compile.*Leave one out"):
        quick_fit("llama", "prompted", compile=True, recompute="on")


@pytest.mark.parametrize("wrong", ["fails", "differs"])
def test_what_is_compiled_wrongly_is_refused(wrong: str, quick_fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any, **options: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if wrong == "fails":
                raise RuntimeError("no such kernel.\nmore")
            return call(*args, **kwargs) * 1.01

        return run

    monkeypatch.setattr(torch, "compile", broken)
    reason = "cannot be compiled: no such kernel. Leave" if wrong == "fails" else "give other gradients"
    with pytest.raises(ConfigError, match=reason):
        quick_fit("llama", "prompted", compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("settings", [{}, {"dtype": "bf16"}, {"method": "dora"}], ids=str)
def test_real_kernels_learn_the_same_and_go_on_with_the_same_bits(
    settings: dict[str, Any], quick_fit: Fit, bases: Any, rows_of: Any, tmp_path: Path
) -> None:
    given = {**settings, "save_every": 3}
    expected = losses(quick_fit, "llama", "prompted", **given, max_steps=8)
    watched, rest = Losses(), Losses()

    class Stops(Losses):
        def step(self, step: Step) -> None:
            super().step(step)
            if step.step == 5:
                raise KeyboardInterrupt

    whole = quick_fit("llama", "prompted", observer=watched, **given, compile=True, max_steps=8)
    assert watched.found == pytest.approx(expected, rel=5e-3 if "dtype" in settings else FP32)
    proof = whole.summary.proof
    assert proof is not None
    assert proof.base_unchanged
    examples = rows_of("prompted")
    fixed = {"lr": 5e-3, "batch_size": 8, "validation": 0.2, "compile": True, "max_steps": 8, **given}
    with pytest.raises(KeyboardInterrupt):
        fit(bases("llama"), examples, observer=Stops(), output=tmp_path / "run", **fixed)
    torch._dynamo.reset()  # as in a new process
    resume(tmp_path / "run", rows=examples, observer=rest)
    assert 0 < len(rest.found) < 8
    assert watched.found[-len(rest.found) :] == rest.found
