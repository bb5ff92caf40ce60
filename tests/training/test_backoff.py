"""Memory that runs out in a run: the micro-batches are halved once, visibly, and the step is taken again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import TrainingError
from lorakit.training.config import read_config
from lorakit.training.fit import FitResult, fit, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.stepper import is_out_of_memory

Rows = Callable[..., list[dict[str, Any]]]
SETTINGS = {"max_steps": 8, "lr": 1e-2, "batch_size": 8, "micro_batch": 8, "validation": 0.2, "save_every": 1}


class Watch(Observer):
    def __init__(self, stop: int = 0) -> None:
        self.notes: list[str] = []
        self.losses: list[float] = []
        self.stop = stop

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: Step) -> None:
        self.losses.append(step.loss)
        if step.step == self.stop:
            raise TrainingError("the power went out")


@contextmanager
def little_memory(model: nn.Module, rows: int, after: int = 0, error: type[Exception] = torch.OutOfMemoryError) -> Any:
    """Let the model run out of memory while training on more than ``rows`` rows, ``after`` so many forwards of them."""
    seen = 0

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal seen
        if module.training and torch.is_grad_enabled() and kwargs["input_ids"].shape[0] > rows:
            seen += 1
            if seen > after:
                raise error("not enough memory: you tried to allocate 99 bytes")

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def parts(build: Any, tokenizer: Any, rows_of: Rows) -> tuple[nn.Module, Any, list[dict[str, Any]]]:
    return build("bert"), tokenizer("bert"), rows_of("classified")


def adapter(result: FitResult) -> list[torch.Tensor]:
    return [p.detach().clone() for p in result.handle.parameters().values()]


# One forward on eight rows is the measuring of a step's memory before the training; a run with a folder times one more.
IN_STEP_4 = 4
IN_STEP_4_WITH_A_FOLDER = 5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_the_micro_batch_is_halved_and_the_run_goes_on(parts: Any, error: type[Exception]) -> None:
    model, words, rows = parts
    watch = Watch()
    with little_memory(model, 4, IN_STEP_4, error):
        result = fit(model, rows, tokenizer=words, observer=watch, **SETTINGS)
    told = [note for note in watch.notes if "memory ran out in step 4 (rows " in note]
    assert len(told) == 1
    assert "micro_batch 8 is now 4, and the step is taken again." in told[0]
    assert told[0] in result.summary.notes
    assert result.summary.num_steps == 8


def test_the_step_is_taken_again_exactly(parts: Any, build: Any, tmp_path: Path) -> None:
    model, words, rows = parts
    watch, planned = Watch(), Watch()
    with little_memory(model, 4, IN_STEP_4):
        first = adapter(fit(model, rows, tokenizer=words, observer=watch, **SETTINGS))
    again = adapter(fit(build("bert"), rows, tokenizer=words, observer=planned, halve_micro_at=4, **SETTINGS))
    assert watch.losses == planned.losses
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_resumed_run_halves_in_the_same_step(parts: Any, build: Any, tmp_path: Path) -> None:
    model, words, rows = parts
    with little_memory(model, 4, IN_STEP_4):
        whole = adapter(fit(model, rows, tokenizer=words, **SETTINGS))
    other = build("bert")
    with little_memory(other, 4, IN_STEP_4_WITH_A_FOLDER), pytest.raises(TrainingError, match="power"):
        fit(other, rows, tokenizer=words, output=tmp_path / "run", observer=Watch(5), **{**SETTINGS, "save_every": 2})
    assert read_config(tmp_path / "run" / "config.yaml")["halve_micro_at"] == 4
    for name in ("step-000004",):  # go on from before the step in which memory ran out
        state = tmp_path / "run" / "checkpoints" / name / "state.json"
        state.unlink()
    again = resume(tmp_path / "run", model=build("bert"), rows=rows, tokenizer=words)
    assert all(torch.equal(a, b) for a, b in zip(whole, adapter(again), strict=True))


def test_a_longest_batch_that_does_not_fit_is_found_before_the_first_step(parts: Any, tmp_path: Path) -> None:
    model, words, rows = parts
    watch = Watch()
    with little_memory(model, 4):
        result = fit(model, rows, tokenizer=words, observer=watch, output=tmp_path / "run", **SETTINGS)
    assert any(note.startswith("Memory does not hold 8 of the longest rows at a time") for note in watch.notes)
    assert result.summary.peak_memory_bytes
    assert read_config(tmp_path / "run" / "config.yaml")["halve_micro_at"] == 1


def test_a_second_time_is_an_error_that_says_what_to_do(parts: Any) -> None:
    model, words, rows = parts
    with little_memory(model, 2, IN_STEP_4), pytest.raises(TrainingError) as caught:
        fit(model, rows, tokenizer=words, **SETTINGS)
    message = str(caught.value)
    assert "memory ran out in step 4 (rows " in message
    assert "again, with half the micro-batch" in message
    assert "Give a smaller micro_batch or max_length, grad_checkpointing" in message


def test_a_micro_batch_of_one_cannot_be_halved(parts: Any) -> None:
    model, words, rows = parts
    with little_memory(model, 0, 12), pytest.raises(TrainingError, match="at a micro-batch of 1"):
        fit(model, rows, tokenizer=words, **{**SETTINGS, "micro_batch": 1})


def test_other_errors_are_not_taken_for_it(parts: Any) -> None:
    model, words, rows = parts

    def fail(module: nn.Module, args: Any) -> None:
        if module.training:
            raise RuntimeError("the sizes do not fit")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="sizes"):
        fit(model, rows, tokenizer=words, **SETTINGS)


def test_torchs_own_words_are_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
