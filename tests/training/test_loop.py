"""The loop: how a step's loss is weighed, how the rate moves, that runs repeat, and what is kept."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import Handle, attach
from lorakit.errors import TrainingError
from lorakit.methods import Rule, Update
from lorakit.methods.lora import LoRA
from lorakit.records import Evaluation, Sample
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.fit import FitResult
from lorakit.training.keeper import Keeper, Snapshot
from lorakit.training.loop import train
from lorakit.training.observe import Observer, Step
from lorakit.training.optimizers import optimizer_for
from lorakit.training.plan import Outcome, Plan
from lorakit.training.schedule import Schedule
from lorakit.training.spec import TaskSpec
from lorakit.training.stepper import Stepper, Taken
from lorakit.training.tasks import Task

Fit = Callable[..., FitResult]
Build = Callable[..., nn.Module]
Measure = Callable[[], tuple[Evaluation, Sequence[Sample]]]

# fp32 sums of the same numbers in another order.
GRADIENT_TOLERANCE = 1e-6
KINDS = ("bert", "gpt2", "llama", "t5")


def token_rows(classes: bool, count: int = 6, seed: int = 0) -> list[EncodedRow]:
    """Return rows of unlike lengths, of which unlike numbers of tokens are supervised."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        ids = [draw.randrange(3, 34) for _ in range(draw.randint(4, 12))]
        given = draw.randrange(len(ids) - 1)
        labels: list[int] | int = draw.randrange(3) if classes else [-100] * given + ids[given:]
        rows.append(EncodedRow(ids, labels, number, "", ""))
    return rows


def task_of(kind: str) -> Task:
    if kind == "bert":
        return TaskSpec("classification", ("a", "b", "c")).kind
    return TaskSpec("generation", encoder_decoder=kind == "t5").kind


def stepper_for(handle: Handle, plan: Plan, kind: str = "bert") -> Stepper:
    return Stepper(handle, "default", task_of(kind), Collator(0, encoder_decoder=kind == "t5"), plan)


def shaken(model: nn.Module, method: LoRA | None = None) -> Handle:
    """Attach an adapter whose B is not zero, so that every tensor has a gradient."""
    handle = attach(model, method or LoRA(rank=2, alpha=3.0), seed=1)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return handle


class Remembers(LoRA):
    """Plain LoRA that keeps the gradients it is shown, and what it was called with."""

    name = "remembers"

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        kept = self.__dict__
        return RememberingRule(updates, num_steps, kept.setdefault("gradients", []), kept.setdefault("calls", []))


class RememberingRule(Rule):
    def __init__(self, updates: Mapping[str, Update], num_steps: int, gradients: list[Any], calls: list[Any]) -> None:
        super().__init__(updates, num_steps)
        self.gradients, self.calls = gradients, calls

    def before_step(self, step: int) -> None:
        self.gradients.append([tensor.grad.clone() for u in self.updates.values() for tensor in u.parameters()])
        self.calls.append(("before", step))

    def after_step(self, step: int) -> None:
        self.calls.append(("after", step))


class Penalised(Remembers):
    """Adds the sum of all squares to the loss."""

    name = "penalised"

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        kept = self.__dict__
        return PenalisingRule(updates, num_steps, kept.setdefault("gradients", []), kept.setdefault("calls", []))


class PenalisingRule(RememberingRule):
    def penalty(self) -> Tensor:
        return sum((p.square().sum() for u in self.updates.values() for p in u.parameters()), torch.zeros(()))


def one_step(
    build: Build, kind: str, rows: list[EncodedRow], micro: int, method: Callable[..., Remembers] = Remembers
) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients of one step over all rows, ``micro`` of them at a time."""
    handle = shaken(build(kind), method(rank=2, alpha=3.0))
    plan = Plan(num_steps=1, batch_size=len(rows), micro_batch=micro, lr=0.1, clip_norm=1e9)
    taken = stepper_for(handle, plan, kind).step(rows)
    gradients = handle.entry("default").method.__dict__["gradients"][0]
    return taken.loss, gradients


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_neither_loss_nor_gradients(build: Build, kind: str, micro: int) -> None:
    rows = token_rows(classes=kind == "bert")
    whole_loss, whole = one_step(build, kind, rows, len(rows))
    loss, parts = one_step(build, kind, rows, micro)

    assert loss == pytest.approx(whole_loss, abs=GRADIENT_TOLERANCE)
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=GRADIENT_TOLERANCE)


def test_a_penalty_counts_once_whatever_the_micro_batches(build: Build) -> None:
    rows = token_rows(classes=True)
    whole_loss, whole = one_step(build, "bert", rows, 6, Penalised)
    loss, parts = one_step(build, "bert", rows, 2, Penalised)

    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for found, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=GRADIENT_TOLERANCE)


def test_the_method_is_told_the_same_number_before_and_after_a_step(build: Build) -> None:
    handle = shaken(build("bert"), Remembers(rank=2))
    stepper = stepper_for(handle, Plan(num_steps=2, batch_size=2, micro_batch=2, lr=0.1))
    for _ in range(2):
        stepper.step(token_rows(classes=True, count=2))
    calls = handle.entry("default").method.__dict__["calls"]
    assert calls == [("before", 1), ("after", 1), ("before", 2), ("after", 2)]


class Steps(Observer):
    """Keeps every step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.measured: list[tuple[int, float, bool]] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def evaluation(self, step: int, epoch: float, evaluation: Evaluation, best: bool) -> None:
        self.measured.append((step, evaluation.loss, best))


def test_the_optimizer_follows_the_schedule(quick_fit: Fit) -> None:
    seen = Steps()
    quick_fit(observer=seen, max_steps=9, lr=0.01)
    factors = Schedule("linear", 9)
    assert [step.lr for step in seen.steps] == pytest.approx([0.01 * factors(i) for i in range(9)])


class Faster(LoRA):
    """Trains B four times as fast."""

    name = "faster"

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        return FasterRule(updates, num_steps)


class FasterRule(Rule):
    def groups(self, named: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        parts = {key: [p for name, p in named.items() if name.endswith(f".{key}")] for key in "AB"}
        return [{"params": parts["A"], "lr": lr}, {"params": parts["B"], "lr": 4 * lr}]


def test_the_methods_groups_keep_their_ratio_through_the_schedule(build: Build) -> None:
    plan = Plan(num_steps=10, batch_size=2, micro_batch=2, lr=0.01, weight_decay=0.1)
    stepper = stepper_for(shaken(build("bert"), Faster(rank=2)), plan)
    rates = []
    for _ in range(4):
        stepper.step(token_rows(classes=True, count=2))
        rates.append([group["lr"] for group in stepper.optimizer.param_groups])
    assert [b / a for a, b in rates] == pytest.approx([4.0] * 4)
    assert [group["weight_decay"] for group in stepper.optimizer.param_groups] == [0.1, 0.1]


def test_the_optimizer_holds_the_adapters_parameters_alone(build: Build) -> None:
    handle = shaken(build("bert"))
    optimizer = optimizer_for(Rule({}, 1), handle.parameters(), "adamw", lr=1.0, weight_decay=0.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in handle.parameters().values()}


def adapter_bits(result: FitResult) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in result.handle.parameters().items()}


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(quick_fit: Fit) -> None:
    torch.manual_seed(1)
    first = adapter_bits(quick_fit(seed=3))
    torch.manual_seed(2)
    assert adapter_bits(quick_fit(seed=3)) == first


def test_another_seed_gives_another_adapter(quick_fit: Fit) -> None:
    assert adapter_bits(quick_fit(seed=3)) != adapter_bits(quick_fit(seed=4))


@pytest.mark.parametrize(("kind", "rows"), [("bert", "classified"), ("llama", "prompted")])
def test_a_fit_leaves_the_callers_random_state_alone(quick_fit: Fit, kind: str, rows: str) -> None:
    before = torch.random.get_rng_state(), random.getstate()
    quick_fit(kind, rows)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def run_of(build: Build, num_steps: int = 6, validate: Measure | None = None, **more: Any) -> Outcome:
    """Train two rows to a step on four rows: an epoch has two steps."""
    handle = attach(build("bert"), LoRA(rank=2), seed=0)
    plan = Plan(num_steps=num_steps, batch_size=2, micro_batch=2, lr=more.pop("lr", 0.01), **more.pop("plan", {}))
    rows = token_rows(classes=True, count=more.pop("count", 4))
    observer = more.pop("observer", Observer())
    return train(handle, "default", task_of("bert"), rows, Collator(0), plan, observer, validate, **more)


def losses(*values: float) -> Measure:
    """Return a validation that measures these losses one after the other."""
    found: Iterator[float] = iter(values)

    def validate() -> tuple[Evaluation, Sequence[Sample]]:
        loss = next(found)
        return Evaluation(loss, 1, accuracy=1 - loss), ()

    return validate


def test_the_best_adapter_is_that_of_the_lowest_validation_loss(build: Build) -> None:
    outcome = run_of(build, validate=losses(0.5, 0.3, 0.4))
    assert (outcome.best_step, outcome.steps) == (4, 6)
    assert outcome.best is not None


def test_of_a_classifier_the_most_accurate_adapter_is_kept(build: Build) -> None:
    found = iter([(0.5, 0.7), (0.4, 0.9), (0.2, 0.8)])

    def validate() -> tuple[Evaluation, Sequence[Sample]]:
        loss, accuracy = next(found)
        return Evaluation(loss, 1, accuracy=accuracy), ()

    assert run_of(build, validate=validate).best_step == 4


def test_of_equal_losses_the_earlier_adapter_is_kept(build: Build) -> None:
    assert run_of(build, validate=losses(0.3, 0.3, 0.3)).best_step == 2


def test_the_kept_tensors_are_those_of_their_step(build: Build) -> None:
    handle = attach(build("bert"), LoRA(rank=2), seed=0)
    path = next(iter(handle.updates()))
    seen: list[Tensor] = []
    found = losses(0.3, 0.1, 0.2)

    def validate() -> tuple[Evaluation, Sequence[Sample]]:
        seen.append(handle.updates()[path].get_parameter("B").detach().clone())
        return found()

    plan = Plan(num_steps=6, batch_size=2, micro_batch=2, lr=0.01)
    rows = token_rows(classes=True, count=4)
    best = train(handle, "default", task_of("bert"), rows, Collator(0), plan, Observer(), validate).best

    assert best is not None
    assert torch.equal(best.sites[path].tensors["B"], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_shorter_last_batch_is_trained_on_too(build: Build) -> None:
    seen = Steps()
    outcome = run_of(build, num_steps=6, count=5, observer=seen)
    assert outcome.epochs == 2.0
    rows = token_rows(classes=True, count=5)
    assert outcome.tokens == 2 * sum(len(row.input_ids) for row in rows)


def test_fewer_steps_than_an_epoch_are_measured_once_at_their_end(build: Build) -> None:
    seen = Steps()
    run_of(build, num_steps=1, validate=losses(0.3), observer=seen)
    assert seen.measured == [(1, 0.3, True)]


def test_each_step_and_measurement_is_a_line_of_metrics(build: Build) -> None:
    kept = Keeps()
    outcome = run_of(build, num_steps=4, validate=losses(0.5, 0.4), keeper=kept)
    lines = kept.lines
    assert lines == outcome.metrics
    kinds = [(line["kind"], line["step"]) for line in lines]
    assert kinds == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)]
    assert lines[2]["loss"] == 0.5


class Keeps(Keeper):
    """Keeps everything in memory."""

    saves = True

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.snapshots: list[Snapshot] = []

    def log(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)

    def save(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)


class Interrupts(Steps):
    """Sends a signal to this process at some steps, as Ctrl-C does."""

    def __init__(self, *at: int, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.at, self.number = at, number

    def step(self, step: Step) -> None:
        super().step(step)
        if step.step in self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_run_after_the_step_at_hand(build: Build, number: int) -> None:
    before = signal.getsignal(number)
    outcome = run_of(build, num_steps=6, observer=Interrupts(3, number=number), validate=losses(0.5))
    assert (outcome.steps, outcome.interrupted) == (3, True)
    assert signal.getsignal(number) is before


def test_a_signal_in_the_last_step_leaves_a_finished_run(build: Build) -> None:
    outcome = run_of(build, num_steps=4, observer=Interrupts(4), validate=losses(0.5, 0.4))
    assert not outcome.interrupted
    assert outcome.best_step == 4


class Impatient(Interrupts):
    """Presses Ctrl-C twice."""

    def step(self, step: Step) -> None:
        super().step(step)
        super().step(step)


def test_a_second_signal_interrupts_at_once(build: Build) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_of(build, observer=Impatient(1))
    assert signal.getsignal(signal.SIGINT) is before


def test_training_runs_in_a_thread_that_is_not_the_main_one(build: Build) -> None:
    found: list[Outcome] = []
    worker = threading.Thread(target=lambda: found.append(run_of(build)))
    worker.start()
    worker.join()
    assert found[0].steps == 6


def test_a_loss_that_is_no_number_names_the_step_and_what_to_do(build: Build) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+.* \(1e\+30 here\).*a tenth"):
        run_of(build, num_steps=20, lr=1e30, plan={"clip_norm": 1e30})


def test_a_validation_loss_that_is_no_number_ends_the_run(build: Build) -> None:
    with pytest.raises(TrainingError, match="validation rows is nan after step 2"):
        run_of(build, validate=losses(math.nan))


def test_after_an_error_the_model_is_in_evaluation_mode(build: Build) -> None:
    model = build("bert")
    handle = attach(model, LoRA(rank=2), seed=0)
    plan = Plan(num_steps=4, batch_size=2, micro_batch=2, lr=0.01)
    rows = token_rows(classes=True, count=4)
    with pytest.raises(TrainingError):
        train(handle, "default", task_of("bert"), rows, Collator(0), plan, Observer(), losses(math.inf))
    assert not any(module.training for module in model.modules())


def test_training_leaves_nothing_on_a_model_object(build: Build) -> None:
    model = build("bert")
    before = set(model.__dict__)
    handle = attach(model, LoRA(rank=2), seed=0)
    plan = Plan(num_steps=2, batch_size=2, micro_batch=2, lr=0.01)
    rows = token_rows(classes=True, count=4)
    train(handle, "default", task_of("bert"), rows, Collator(0), plan, Observer())
    assert set(handle.detach().__dict__) == before


def test_an_fp16_base_trains_with_a_scaled_loss(build: Build) -> None:
    handle = attach(build("llama").half(), LoRA(rank=2), seed=0)
    plan = Plan(num_steps=8, batch_size=4, micro_batch=2, lr=0.02, dtype="fp16")
    rows = token_rows(classes=False, count=4)
    outcome = train(handle, "default", task_of("llama"), rows, Collator(0), plan, Observer())
    first, last = (outcome.metrics[i]["loss"] for i in (0, -1))
    assert last < first
    assert all(torch.isfinite(p).all() for p in handle.parameters().values())


def test_the_gradient_is_clipped_to_the_norm_asked_for(build: Build) -> None:
    handle = shaken(build("bert"))
    plan = Plan(num_steps=1, batch_size=2, micro_batch=2, lr=0.1, clip_norm=1e-3)
    norms: list[Tensor] = []
    stepper = stepper_for(handle, plan)
    stepper.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in stepper.parameters if p.grad is not None]).norm())
    )
    taken: Taken = stepper.step(token_rows(classes=True, count=2))
    assert taken.norm > 1e-3
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)


def test_a_step_that_fails_changes_no_parameter(build: Build) -> None:
    handle = shaken(build("bert"))
    before = {name: p.detach().clone() for name, p in handle.parameters().items()}
    stepper = stepper_for(handle, Plan(num_steps=1, batch_size=2, micro_batch=2, lr=0.1))
    with torch.no_grad():
        next(iter(handle.parameters().values())).fill_(math.nan)
    with pytest.raises(TrainingError, match="step 1"):
        stepper.step(token_rows(classes=True, count=2))
    changed = [name for name, p in list(handle.parameters().items())[1:] if not torch.equal(p, before[name])]
    assert changed == []
