"""How a run goes as lines of JSON on stderr, for programs: what a person is shown, one object an event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli import output
from lorakit.cli.progress import Watch
from lorakit.records import Choice, Evaluation, to_json

if TYPE_CHECKING:
    from lorakit.training.observe import About, Step


class JsonWatch(Watch):
    """Watches a run and writes each event as one line of JSON.

    Its ``kind`` is 'stage', 'setting', 'begins', 'train', 'eval', 'note', 'resumes', 'checkpoint' or 'ends'; those of
    steps and evaluations have the fields that they have in ``metrics.jsonl``.
    """

    def __init__(self) -> None:
        """Nothing is drawn, also on a terminal."""
        super().__init__(show_choices=False, quiet=True)

    def stage(self, text: str) -> None:
        """Write what is being done now."""
        super().stage(text)
        self._write("stage", {"text": text})

    def choices(self, choices: Sequence[Choice]) -> None:
        """Write every setting."""
        for choice in choices:
            self._write("setting", to_json(choice))

    def begins(self, about: About) -> None:
        """Write what is trained on what."""
        super().begins(about)
        self._write("begins", to_json(about))

    def note(self, text: str) -> None:
        """Write a remark."""
        self._write("note", {"text": text})

    def step(self, step: Step) -> None:
        """Write a step."""
        self.figures.add(step)
        self._write("train", to_json(step))

    def evaluation(self, step: int, epoch: float, evaluation: Evaluation, best: bool) -> None:
        """Write an evaluation."""
        self.figures.held_out.append(evaluation.loss)
        self._write("eval", {"step": step, "epoch": epoch, "best": best, **to_json(evaluation)})

    def resumes(self, step: int, num_steps: int) -> None:
        """Write where the run goes on."""
        super().resumes(step, num_steps)
        self._write("resumes", {"step": step, "num_steps": num_steps})

    def checkpointed(self, step: int, place: str) -> None:
        """Write where a checkpoint is."""
        super().checkpointed(step, place)
        self._write("checkpoint", {"step": step, "folder": place})

    def training_ends(self) -> None:
        """Write that the last step is done, and whether it was to be the last."""
        last = self.figures.last
        self._write(
            "ends", {"step": last.step if last else 0, "interrupted": last is None or last.step < last.num_steps}
        )

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        output.say_json({"kind": kind, **values})
