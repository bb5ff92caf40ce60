"""Shows on stderr how a run goes: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli import output
from lorakit.cli.live import SIGNS, WORDS, Figures, Panel, header, measured
from lorakit.records import Choice, Evaluation
from lorakit.training.observe import Observer

if TYPE_CHECKING:
    from rich.live import Live
    from rich.status import Status

    from lorakit.training.observe import About, Step

PLAIN_LINES = 10
"""Lines in a whole training where there is no terminal; more only where it is a long one."""

PATIENT_LINES = 40
"""More of them in a long training: one after each such part of its time, but none within a minute of the last."""


class Watch(Observer):
    """Watches a run for the command line; use it in a ``with`` block.

    Attributes:
        figures: those of the run so far.
        checkpoint: the step of the last checkpoint; None before the first.
        adapter_saved: the adapter itself is in the run folder.
    """

    def __init__(self, show_choices: bool = True, quiet: bool = False) -> None:
        """Show everything, or leave out the settings; ``quiet`` leaves remarks and errors alone."""
        self.show_choices = show_choices and not quiet
        self.figures = Figures()
        self.checkpoint: int | None = None
        self.adapter_saved = False
        self._stage = ""
        self._console = output.progress()
        self._console.quiet = quiet
        self._live = self._console.is_terminal
        self._status: Status | None = None
        self._bar: Live | None = None
        self._said = 0.0
        # Arrows where the encoding has them; words in what is read later, as a log is.
        self._signs = SIGNS if self._live and self._console.encoding.startswith("utf") else WORDS
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

    def begins(self, about: About) -> None:
        """Print what is trained on what."""
        self.figures.device, self.figures.begun = about.device, time.monotonic()
        self._clear()
        lines = header(about)
        if self._live:
            self._console.print()
        for name, text in lines:
            self._heading(name, text)

    def note(self, text: str) -> None:
        """Print a remark."""
        self._clear()
        output.note(text)

    def step(self, step: Step) -> None:
        """Draw the step, or print it if one is due."""
        self.figures.add(step)
        if self._live:
            self._draw()
            return
        part = step.step * PLAIN_LINES // step.num_steps
        patience = max(60.0, step.seconds / step.step * step.num_steps / PATIENT_LINES)
        due = part > (step.step - 1) * PLAIN_LINES // step.num_steps or time.monotonic() - self._said > patience
        if due or step.step == 1:
            figures = "  ".join([*self.figures.texts(self._signs), f"{self.figures.left} left"])
            self._line(f"step {step.step:,} of {step.num_steps:,}  {figures}")

    def evaluation(self, step: int, epoch: float, evaluation: Evaluation, best: bool) -> None:
        """Print what the held-out rows say; on a terminal the line stays above the bar."""
        self.figures.held_out.append(evaluation.loss)
        self._line(measured(epoch, evaluation, best, self._signs[self.figures.held_out_direction].strip()))

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
        last = self.figures.last
        if last is not None and last.step < last.num_steps:
            self._line(f"interrupted after step {last.step:,} of {last.num_steps:,}")

    def _draw(self) -> None:
        if self._bar is None:
            self._clear()
            from rich.live import Live

            panel: Any = Panel(self.figures, self._signs)
            self._bar = Live(panel, console=self._console, transient=True, refresh_per_second=8)
            self._bar.start()

    def _heading(self, name: str, text: str) -> None:
        """Print a line of the header; on a terminal its further lines stand below its first."""
        if not self._live:
            self._line(f"{name}: {text}")
            return
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", min_width=6, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text(name), Text(text))
        self._console.print(grid)

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=not self._live)

    def _clear(self) -> None:
        for shown in (self._status, self._bar):
            if shown is not None:
                shown.stop()
        self._status = self._bar = None
