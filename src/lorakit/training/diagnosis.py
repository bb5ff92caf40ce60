"""What is wrong with a run, read off its history: the rows concerned, the likely cause, and what to do.

Pure functions: the same history gives the same answer, so that a resumed run warns of what the whole run would.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.records import Evaluation

FIRST_STEPS = 3
"""So many first steps without a loss, or without a gradient, are no accident."""
WINDOW = 10
RISEN = 1.3
"""A mean training loss of so many times the first steps' one has risen."""
SPIKE = 50.0
"""A gradient of so many times the median of those before it is a spike."""
STILL = 0.005
"""A loss that has moved by a smaller share is standing still."""
WORSE = 1.02
FAR = 30.0
"""A learning rate of so many times the usual one, or so many times less, is far off."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: what it is, in one word; each is told once in a run.
        text: what was seen where, the likely cause, and what to do.
        fatal: the run cannot go on.
    """

    name: str
    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Setting:
    """What the diagnosis must know of a run.

    Attributes:
        lr: the peak learning rate, and ``usual_lr`` what the recipe would take.
        num_steps, num_warmup: of the schedule.
        dtype: of the base: 'fp32', 'bf16' or 'fp16'.
        patience: evaluations without a better one that end the run; None if nothing does.
    """

    lr: float
    usual_lr: float
    num_steps: int
    num_warmup: int
    dtype: str
    patience: int | None = None


@dataclass(frozen=True)
class Seen:
    """One optimizer step: its mean loss in nats, the gradient's norm before clipping, and the rows' numbers."""

    loss: float
    norm: float
    rows: tuple[int, ...] = ()


def broken_loss(loss: float, step: int, rows: Sequence[int], setting: Setting) -> Finding | None:
    """Tell of a loss that is NaN or infinite."""
    if math.isfinite(loss):
        return None
    return Finding(
        "broken-loss",
        f"the loss is {loss} at step {step:,} ({named(rows)}). {_cause_of_overflow(step, setting)}",
        fatal=True,
    )


def broken_gradient(norm: float, step: int, rows: Sequence[int], setting: Setting) -> Finding | None:
    """Tell of a gradient that is NaN or infinite; with fp16 the scaler leaves such a step out."""
    if math.isfinite(norm) or setting.dtype == "fp16":
        return None
    return Finding(
        "broken-gradient",
        f"the gradient is {norm} at step {step:,} ({named(rows)}), though the loss is a number. "
        f"{_cause_of_overflow(step, setting)}",
        fatal=True,
    )


def unreached() -> Finding:
    """Tell of a loss that does not depend on anything that is trained."""
    return Finding(
        "unreached",
        "the loss does not depend on the adapter: nothing that is trained is on its way. Likely causes: the targets "
        "are layers that this model's forward does not use, its parameters were frozen, or the model cuts the "
        "gradient off. Choose other targets; `lorakit inspect` lists the layers.",
        fatal=True,
    )


def after_step(history: Sequence[Seen], setting: Setting) -> list[Finding]:
    """Return what the steps so far show, the last one being new."""
    checks = (nothing_to_learn, nothing_learned, always_overflowing, spike, rate_too_high, rate_too_low)
    return [finding for check in checks if (finding := check(history, setting)) is not None]


def nothing_to_learn(history: Sequence[Seen], setting: Setting) -> Finding | None:
    """Tell of a loss that is exactly 0: fatal where it never was anything else."""
    step, last = len(history), history[-1]
    if last.loss != 0:
        return None
    if step <= FIRST_STEPS and all(seen.loss == 0 for seen in history):
        if step < FIRST_STEPS:
            return None
        return Finding(
            "zero-loss",
            f"the loss is exactly 0 in each of the first {FIRST_STEPS} steps (at step {step:,}: {named(last.rows)}): "
            "nothing is left to learn, or no token is. Likely causes: every label is masked, the model has been "
            "trained on these rows already, or its half-precision attention returns zeros. Look at the rows, or try "
            "dtype 'fp32'.",
            fatal=True,
        )
    return Finding(
        "zero-loss",
        f"the loss is exactly 0 at step {step:,} ({named(last.rows)}): every label there is predicted with certainty, "
        "or all are masked. More passes teach nothing: stop earlier, or look at these rows.",
    )


def nothing_learned(history: Sequence[Seen], setting: Setting) -> Finding | None:
    """Tell of gradients that are exactly 0: fatal where they never were anything else."""
    step, last = len(history), history[-1]
    if last.norm != 0 or last.loss == 0:
        return None
    first = step <= FIRST_STEPS and all(seen.norm == 0 for seen in history)
    if first and step < FIRST_STEPS:
        return None
    underflow = " They are too small for fp16: try dtype 'bf16' or 'fp32'." if setting.dtype == "fp16" else ""
    if first:
        return Finding(
            "zero-gradient",
            f"the gradient is exactly 0 in each of the first {FIRST_STEPS} steps while the loss is {last.loss:.3g}: "
            "the adapter does not reach the loss. Likely causes: its layers are not used by this model's forward, or "
            f"its parameters were frozen. Choose other targets; `lorakit inspect` lists the layers.{underflow}",
            fatal=True,
        )
    return Finding(
        "zero-gradient",
        f"the gradient is exactly 0 at step {step:,} ({named(last.rows)}): these rows teach nothing.{underflow}",
    )


def always_overflowing(history: Sequence[Seen], setting: Setting) -> Finding | None:
    """Tell of fp16 gradients that overflow ten times in a row, so that no step is taken."""
    last = history[-WINDOW:]
    if len(last) < WINDOW or any(math.isfinite(seen.norm) for seen in last):
        return None
    return Finding(
        "fp16-overflow",
        f"the gradient has overflowed in fp16 for {WINDOW} steps up to step {len(history):,}, and none was taken. "
        "Use dtype 'bf16' or 'fp32'.",
    )


def spike(history: Sequence[Seen], setting: Setting) -> Finding | None:
    """Tell of a gradient far larger than those before it."""
    before = [seen.norm for seen in history[-5 * WINDOW - 1 : -1] if math.isfinite(seen.norm)]
    last = history[-1]
    if len(before) < WINDOW or not math.isfinite(last.norm):
        return None
    usual = statistics.median(before)
    if usual <= 0 or last.norm < SPIKE * usual or last.norm < 1.0:
        return None
    return Finding(
        "spike",
        f"the gradient is {last.norm:.3g} at step {len(history):,}, {last.norm / usual:,.0f} times the usual "
        f"({named(last.rows)}). It was clipped. Look at these rows: wrong labels, or text of another kind.",
    )


def rate_too_high(history: Sequence[Seen], setting: Setting) -> Finding | None:
    """Tell of a training loss that rises."""
    step = len(history)
    if step < setting.num_warmup + 2 * WINDOW:
        return None
    first, now = _mean(history[:WINDOW]), _mean(history[-WINDOW:])
    if not now > RISEN * first or now - first < 0.1:
        return None
    return Finding(
        "rate-too-high",
        f"the training loss has risen from {first:.3g} to {now:.3g} by step {step:,}: the learning rate "
        f"{setting.lr:g} is likely too high. Try {setting.lr / 10:g}.",
    )


def rate_too_low(history: Sequence[Seen], setting: Setting) -> Finding | None:
    """Tell of a training loss that stands still at a learning rate far below the usual one."""
    step = len(history)
    if step < max(setting.num_warmup + 3 * WINDOW, setting.num_steps // 3) or setting.lr * FAR > setting.usual_lr:
        return None
    first, now = _mean(history[:WINDOW]), _mean(history[-WINDOW:])
    if abs(now - first) > STILL * first:
        return None
    return Finding(
        "rate-too-low",
        f"the training loss stands still ({first:.4g}, then {now:.4g} by step {step:,}): the learning rate "
        f"{setting.lr:g} is far below the usual {setting.usual_lr:g}. Try that.",
    )


def rate_far_off(lr: float, usual_lr: float) -> Finding | None:
    """Tell, before the first step, of a learning rate far from what such models like."""
    factor = lr / usual_lr
    if 1 / FAR < factor < FAR:
        return None
    words = f"{factor:,.0f} times" if factor > 1 else f"1/{1 / factor:,.0f} of"
    return Finding(
        "rate-far-off",
        f"The learning rate {lr:g} is {words} the usual {usual_lr:g} for such a model: "
        f"{'the loss may rise or become NaN' if factor > 1 else 'little will be learned'}.",
    )


def after_evaluation(measured: Sequence[tuple[int, Evaluation]], setting: Setting) -> list[Finding]:
    """Return what the evaluations so far, with their steps, show: a validation loss that rises."""
    if len(measured) < 3:
        return []
    best_step, best = min(measured, key=lambda pair: pair[1].loss)
    (_, before), (step, last) = measured[-2:]
    if not (last.loss > before.loss > best.loss and last.loss > WORSE * best.loss):
        return []
    ends = " (`--patience 2` ends a run then)" if setting.patience is None else ""
    return [
        Finding(
            "overfitting",
            f"the validation loss rises: {best.loss:.4g} at step {best_step:,}, {last.loss:.4g} at step {step:,}. The "
            f"adapter learns its rows by heart; the best one is kept{ends}. More rows, fewer epochs, dropout or a "
            "lower rank help.",
        )
    ]


def broken_evaluation(found: Evaluation, step: int) -> Finding | None:
    """Tell of a validation loss that is NaN or infinite."""
    if math.isfinite(found.loss):
        return None
    return Finding(
        "broken-evaluation",
        f"the loss on the validation rows is {found.loss} after step {step:,}: the adapter has grown beyond all "
        "bounds. Try a tenth of the learning rate.",
        fatal=True,
    )


def broken_base(loss: float, rows: Sequence[int]) -> Finding:
    """Tell of a base that gives no number for some validation rows before anything is learned."""
    return Finding(
        "broken-base",
        f"the loss of the untouched base on the validation rows is {loss} ({named(rows)}). Likely causes: rows unlike "
        "the others, or numbers beyond the dtype's range. Look at these rows, or try dtype 'fp32'.",
        fatal=True,
    )


def named(rows: Sequence[int]) -> str:
    """Name a batch by its rows' numbers, 12 at most."""
    shown = ", ".join(f"{number:,}" for number in rows[:12])
    more = f" and {len(rows) - 12:,} more" if len(rows) > 12 else ""
    return f"row{'' if len(rows) == 1 else 's'} {shown}{more}" if rows else "no rows"


def _cause_of_overflow(step: int, setting: Setting) -> str:
    tenth = f"Try a tenth of it, {setting.lr / 10:g}"
    high = f"a learning rate that is too high ({setting.lr:g} here)"
    if step == 1:
        half = f" in {setting.dtype}" if setting.dtype != "fp32" else ""
        return (
            f"Nothing has been learned yet, so the base itself gives it for this batch{half}. Likely causes: a row "
            "that is unlike the others, or numbers beyond the dtype's range. Look at these rows, or try dtype 'fp32'."
        )
    if setting.dtype == "fp16":
        return f"Likely causes: fp16 overflow, or {high}. Try dtype 'bf16' or 'fp32'; {tenth[0].lower()}{tenth[1:]}."
    return f"The likely cause is {high}. {tenth}."


def _mean(history: Sequence[Seen]) -> float:
    return sum(seen.loss for seen in history) / len(history)
