"""Shows on stderr how a run goes: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli import output
from lorakit.records import Choice, Evaluation
from lorakit.training.observe import Observer, Step

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.status import Status

PLAIN_LINES = 10
"""Lines in a whole training where there is no terminal; more only where one takes longer than a minute."""

SMOOTHING = 0.9


class Watch(Observer):
    """Watches a run for the command line; use it in a ``with`` block.

    Attributes:
        last: the last optimizer step that was seen.
        checkpoint: the step of the last checkpoint; None before the first.
        adapter_saved: the adapter itself is in the run folder.
    """

    def __init__(self, show_choices: bool = True, quiet: bool = False) -> None:
        """Show everything, or leave out the settings; ``quiet`` leaves remarks and errors alone."""
        self.show_choices = show_choices and not quiet
        self.last: Step | None = None
        self.checkpoint: int | None = None
        self.adapter_saved = False
        self._stage = ""
        self._console = output.progress()
        self._console.quiet = quiet
        self._live = self._console.is_terminal
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._loss = 0.0
        self._seen = 0
        self._said = 0.0
        self._interrupted = False
        self._handler: Any = None

    def __enter__(self) -> Watch:
        """Return the observer; from now on a Ctrl-C is remembered."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        """Take away what is drawn."""
        self._clear()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def stage(self, text: str) -> None:
        """Show what is being done now; a Ctrl-C that was swallowed on the way (by an import, say) is raised again."""
        if self._interrupted:
            raise KeyboardInterrupt
        self.adapter_saved = self.adapter_saved or self._stage == "saving the adapter"
        self._stage = text
        self._clear()
        if self._live:
            self._status = self._console.status(text)
            self._status.start()
        elif text != "training":
            self._line(text)

    def choices(self, choices: Sequence[Choice]) -> None:
        """Print the settings with their reasons, as a result."""
        if not self.show_choices:
            return
        from lorakit.reports.tables import choices_table

        self._clear()
        output.show(choices_table(choices))
        output.results().file.flush()

    def note(self, text: str) -> None:
        """Print a remark."""
        self._clear()
        output.note(text)

    def step(self, step: Step) -> None:
        """Draw the step, or print it if one is due."""
        self._seen += 1
        weight = min(SMOOTHING, 1 - 1 / self._seen)
        self._loss = weight * self._loss + (1 - weight) * step.loss
        self.last = step
        if self._live:
            self._draw(step)
            return
        tenth = step.step * PLAIN_LINES // step.num_steps
        due = tenth > (step.step - 1) * PLAIN_LINES // step.num_steps or time.monotonic() - self._said > 60
        if due or step.step == 1:
            self._line(f"step {step.step:,} of {step.num_steps:,}  {'  '.join(self._figures(step).values())}")

    def evaluation(self, step: int, epoch: float, evaluation: Evaluation, best: bool) -> None:
        """Print what the held-out rows say."""
        words = f"epoch {epoch:.3g}: validation loss {evaluation.loss:.3f}"
        if evaluation.perplexity is not None:
            words += f", perplexity {evaluation.perplexity:,.4g}"
        elif evaluation.accuracy is not None:
            words += f", accuracy {100 * evaluation.accuracy:.1f} %"
        if evaluation.macro_f1 is not None:
            words += f", macro-F1 {evaluation.macro_f1:.3f}"
        self._line(words + (" (best so far)" if best else ""))

    def resumes(self, step: int, num_steps: int) -> None:
        """Say where the run goes on."""
        self.checkpoint = step
        self._line(f"going on after step {step:,} of {num_steps:,}")

    def checkpointed(self, step: int, place: str) -> None:
        """Remember that the run can be resumed from here."""
        self.checkpoint = step

    def training_ends(self) -> None:
        """Take the bar away; say so if the run was interrupted."""
        self._clear()
        if self.last is not None and self.last.step < self.last.num_steps:
            self._line(f"interrupted after step {self.last.step:,} of {self.last.num_steps:,}")

    def _figures(self, step: Step) -> dict[str, str]:
        left = round((step.num_steps - step.step) * step.seconds / step.step)
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        return {
            "loss": f"loss {self._loss:.3f}",
            "lr": f"lr {step.lr:.1e}",
            "speed": f"{step.tokens_per_s:,.0f} tokens/s",
            "left": f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left",
        }

    def _draw(self, step: Step) -> None:
        figures: dict[str, Any] = self._figures(step)
        if self._bar is None:
            self._clear()
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = [TextColumn(f"{{task.fields[{name}]}}") for name in figures]
            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                *columns,
                console=self._console,
                transient=True,
                expand=True,
            )
            self._bar.start()
            self._bar.add_task("training", total=step.num_steps, **figures)
        self._bar.update(self._bar.task_ids[0], completed=step.step, **figures)

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=True)

    def _clear(self) -> None:
        for shown in (self._status, self._bar):
            if shown is not None:
                shown.stop()
        self._status = self._bar = None
