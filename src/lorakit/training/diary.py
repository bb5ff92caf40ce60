"""``Diary``: keeps what happens in a run, looks it over for what is wrong, and tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.adapters import AdapterState
from lorakit.errors import TrainingError
from lorakit.records import Evaluation, Sample, from_json, to_json
from lorakit.training import diagnosis
from lorakit.training.diagnosis import Finding, Seen
from lorakit.training.keeper import Keeper, Snapshot
from lorakit.training.observe import Observer, Step
from lorakit.training.plan import Outcome, Plan, Progress
from lorakit.training.stepper import Taken


class Diary:
    """What a run has done so far.

    Attributes:
        progress: where it stands.
        metrics: its lines of metrics; ``notes`` what was told of it.
        best: the best adapter so far.
    """

    def __init__(
        self,
        plan: Plan,
        per_epoch: int,
        observer: Observer,
        keeper: Keeper,
        goodness: Callable[[Evaluation], tuple[float, ...]],
    ) -> None:
        self.plan, self.per_epoch = plan, per_epoch
        self.observer, self.keeper, self.goodness = observer, keeper, goodness
        self.progress = Progress(plan.micro_batch)
        self.metrics: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.best: AdapterState | None = None
        self._history: list[Seen] = []
        self._measured: list[tuple[int, Evaluation]] = []
        self._told: set[str] = set()

    def load(self, start: Snapshot) -> None:
        """Go on from a snapshot."""
        self.progress, self.best = start.progress, start.best
        self.metrics = [dict(line) for line in start.metrics]
        for line in self.metrics:
            if line["kind"] == "train":
                self._history.append(Seen(line["loss"], line["grad_norm"]))
            elif line["kind"] == "eval":
                self._measured.append((line["step"], from_json(Evaluation, line)))
            elif line["kind"] == "warning":
                self._told.add(line["name"])
                self.notes.append(line["text"])

    @property
    def epochs(self) -> float:
        """Passes over the rows so far."""
        return self.progress.step / self.per_epoch

    @property
    def early(self) -> bool:
        """Whether nothing has become better for as long as the plan allows."""
        return self.plan.patience is not None and self.progress.since_best >= self.plan.patience

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self.progress.step >= self.plan.num_steps or (self.early and not self.progress.unmeasured)

    def step(self, taken: Taken, rows: Sequence[int], tokens: int, seconds: float) -> None:
        """Note a step, the numbers of its rows, its input tokens and its time.

        Raises:
            TrainingError: the steps so far show that the run cannot go on.
        """
        progress = self.progress
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        speed = progress.tokens / max(progress.seconds, 1e-9)
        step = Step(
            progress.step,
            self.plan.num_steps,
            self.epochs,
            taken.loss,
            taken.rate,
            taken.norm,
            speed,
            progress.seconds,
        )
        self._write({"kind": "train", **{key: value for key, value in vars(step).items() if key != "num_steps"}})
        self._history.append(Seen(taken.loss, taken.norm, tuple(rows)))
        self.observer.step(step)
        self._tell(diagnosis.after_step(self._history, self.plan.setting))

    def evaluation(
        self, found: Evaluation, state: Callable[[], AdapterState], samples: Sequence[Sample], settled: bool = True
    ) -> bool:
        """Note what was measured, keep the adapter if none was better, and return whether that is so.

        One that is not ``settled`` is of another size than the run is to end with: it is neither kept nor counted.

        Raises:
            TrainingError: the loss is not finite.
        """
        progress = self.progress
        broken = diagnosis.broken_evaluation(found, progress.step)
        if broken is not None:
            raise TrainingError(broken.text)
        before = progress.best_measure
        best = settled and (before is None or self.goodness(found) > self.goodness(before))
        if best:
            self.best = state()
            progress.best_step, progress.best_measure, progress.since_best = progress.step, found, 0
        elif settled:
            progress.since_best += 1
        progress.unmeasured = False
        self._measured.append((progress.step, found))
        self._write(
            {"kind": "eval", "step": progress.step, "epoch": self.epochs, **to_json(found)}
            | ({"samples": to_json(list(samples))} if samples else {})
        )
        self.observer.evaluation(progress.step, self.epochs, found, best)
        if samples:
            self.observer.samples(progress.step, samples)
        self._tell(diagnosis.after_evaluation(self._measured, self.plan.setting))
        return best

    def remark(self, name: str, text: str) -> None:
        """Note something the user should know, once in a run, live and in the metrics."""
        if name in self._told:
            return
        self._told.add(name)
        self.notes.append(text)
        step, loss = self.progress.step, self.metrics[-1]["loss"] if self.metrics else None
        self._write({"kind": "warning", "step": step, "epoch": self.epochs, "loss": loss, "name": name, "text": text})
        self.observer.note(text)

    def outcome(self) -> Outcome:
        """Return what the run has done."""
        progress = self.progress
        return Outcome(
            steps=progress.step,
            epochs=self.epochs,
            seconds=progress.seconds,
            tokens=progress.tokens,
            best=self.best,
            best_step=progress.best_step,
            best_measure=progress.best_measure,
            interrupted=not self.ended,
            early=self.ended and progress.step < self.plan.num_steps,
            metrics=self.metrics,
            notes=self.notes,
        )

    def _tell(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            if finding.fatal:
                raise TrainingError(finding.text)
            self.remark(finding.name, finding.text)

    def _write(self, line: Mapping[str, Any]) -> None:
        if not self.metrics:
            for first in self.keeper.opening():
                self._append(first)
        self._append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        self.metrics.append(dict(line))
        self.progress.num_lines += 1
        self.keeper.log(line)
