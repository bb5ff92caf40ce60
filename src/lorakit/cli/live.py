"""What a training looks like while it goes: the header, the figures of a step, and the bar above them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorakit.records import Evaluation

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from lorakit.training.observe import About, Step

WINDOW = 10
"""Steps whose mean loss is shown, and compared with that of as many before them."""

STEADY = 0.005
"""A mean loss that changes by less than this share of itself has no direction."""

SIGNS = {"falls": "↓", "rises": "↑", "": " "}
WORDS = {"falls": "(falling)", "rises": "(rising)", "": ""}


@dataclass
class Figures:
    """The figures of a run so far.

    Attributes:
        losses: those of the last steps.
        held_out: every validation loss.
        device: where the model is; None until it is known.
        begun: when the first step was awaited, by the clock that only goes forward.
        last: the last step; None before the first.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=2 * WINDOW))
    held_out: list[float] = field(default_factory=list)
    device: str | None = None
    begun: float = field(default_factory=time.monotonic)
    last: Step | None = None

    def add(self, step: Step) -> None:
        """Take a step."""
        self.losses.append(step.loss)
        self.last = step

    @property
    def loss(self) -> float:
        """The mean loss of the last steps."""
        recent = list(self.losses)[-WINDOW:]
        return statistics.fmean(recent)

    @property
    def direction(self) -> str:
        """Where the mean loss goes: 'falls', 'rises' or ''."""
        half = len(self.losses) // 2
        if half < 2:
            return ""
        values = list(self.losses)
        return _direction(statistics.fmean(values[-2 * half : -half]), statistics.fmean(values[-half:]))

    @property
    def held_out_direction(self) -> str:
        """Where the validation loss goes."""
        return _direction(*self.held_out[-2:]) if len(self.held_out) > 1 else ""

    def texts(self, signs: dict[str, str]) -> list[str]:
        """Write the figures but for the time; ``signs`` says how a direction is written."""
        assert self.last is not None
        found = [_directed(f"loss {self.loss:.3f}", signs[self.direction])]
        if self.held_out:
            found.append(_directed(f"val {self.held_out[-1]:.3f}", signs[self.held_out_direction]))
        found += [f"lr {self.last.lr:.1e}", f"{self.last.tokens_per_s:,.0f} tokens/s"]
        memory = peak_memory(self.device)
        return found + ([f"peak {memory / 2**30:,.2f} GiB"] if memory else [])

    @property
    def left(self) -> str:
        """The time left."""
        assert self.last is not None
        return clock((self.last.num_steps - self.last.step) * self.last.seconds / self.last.step)


def _directed(text: str, sign: str) -> str:
    return f"{text} {sign}".rstrip()


def _direction(before: float, now: float) -> str:
    if abs(now - before) <= STEADY * abs(before):
        return ""
    return "falls" if now < before else "rises"


def clock(seconds: float) -> str:
    """Write a time as on a clock: ``0:07``, ``1:02:03``.

    >>> clock(7.2), clock(3723)
    ('0:07', '1:02:03')
    """
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def peak_memory(device: str | None) -> int | None:
    """Return the most bytes so far: a GPU's tensors, else this process's; None where the system does not say."""
    if device is not None and device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return None
    import sys

    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Panel:
    """The bar and, below it, the figures: in as many lines as the width asks for, cut nowhere.

    Drawn anew at each refresh, so that the clock goes on through a long step or evaluation.
    """

    def __init__(self, figures: Figures, signs: dict[str, str] = SIGNS) -> None:
        """Draw ``figures``, their directions as ``signs`` says."""
        self.figures, self.signs = figures, signs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self.figures.last
        if step is None:
            return
        passed = clock(time.monotonic() - self.figures.begun)
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        share = f"{100 * step.step // step.num_steps:3d} %"
        place = f"{step.step:,}/{step.num_steps:,} {share}  {passed} passed, {self.figures.left} left"
        grid.add_row(ProgressBar(total=step.num_steps, completed=step.step), Text(place))
        yield grid
        for line in packed(self.figures.texts(self.signs), options.max_width):
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def packed(texts: Sequence[str], width: int, gap: str = "   ") -> list[str]:
    """Put texts beside each other, on a new line where one does not fit.

    >>> packed(["loss 2.000", "lr 1.0e-03", "1,234 tokens/s"], 30)
    ['loss 2.000   lr 1.0e-03', '1,234 tokens/s']
    """
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + len(gap) + len(text) <= width:
            lines[-1] += gap + text
        else:
            lines.append(text)
    return lines


def header(about: About) -> list[tuple[str, str]]:
    """Say what is trained on what, as (name, text)."""
    from lorakit.reports import wording

    method = about.method
    sizes = ", ".join(
        f"{name} {method[name]:g}" for name in ("rank", "alpha") if isinstance(method.get(name), int | float)
    )
    targets = ", ".join(about.targets[:7]) + (f" and {len(about.targets) - 7} more" if len(about.targets) > 7 else "")
    share = wording.percent((about.num_trainable - about.num_head) / max(1, about.num_base))
    trained = f"{wording.count(about.num_trainable)} numbers trained"
    head = f" ({wording.count(about.num_head)} of them in the head)" if about.num_head else ""
    batch = f"{about.batch_size:,} a step" + (
        f", {about.micro_batch:,} at a time" if about.micro_batch < about.batch_size else ""
    )
    found = [
        (
            "model",
            f"{wording.model_name(about.model)}: {_large(about.num_base)} numbers, {about.dtype} on {about.device}",
        ),
        ("method", f"{wording.method_name(method)}{' ' if sizes else ''}{sizes}: {trained}{head}, {share} of the base"),
        ("on", targets),
        (
            "data",
            f"{about.num_rows:,} rows, {about.num_tokens:,} tokens an epoch, {batch}; {about.num_held:,} held out",
        ),
        (
            "run",
            f"{about.num_steps:,} steps, {about.epochs:.3g} epochs"
            + (f", into {about.folder}" if about.folder else ""),
        ),
    ]
    plan = about.planned
    if plan is not None and (plan.above_weights is not None or plan.seconds is not None):
        memory = [f"{wording.size(plan.above_weights)} above the model"] if plan.above_weights is not None else []
        taken = [f"about {wording.duration(plan.seconds)}"] if plan.seconds is not None else []
        found.append(("plan", ", ".join(memory + taken)))
    return [(name, text) for name, text in found if text]


def _large(number: int) -> str:
    """Write a model's size: ``22.7 M``, ``7.24 G``."""
    from lorakit.reports import wording

    for unit, factor in (("G", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{wording.significant(number / factor)} {unit}"
    return wording.count(number)


def measured(epoch: float, evaluation: Evaluation, best: bool, sign: str = "") -> str:
    """Write an evaluation on one line."""
    words = _directed(f"epoch {epoch:.3g}: validation loss {evaluation.loss:.3f}", sign)
    if evaluation.perplexity is not None:
        words += f", perplexity {evaluation.perplexity:,.4g}"
    elif evaluation.accuracy is not None:
        words += f", accuracy {100 * evaluation.accuracy:.1f} %"
    if evaluation.macro_f1 is not None:
        words += f", macro-F1 {evaluation.macro_f1:.3f}"
    return words + (" (best so far)" if best else "")
