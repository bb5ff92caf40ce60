"""``Session``: one run from the prepared rows to the run folder, begun or resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.adapters import AdapterState, Handle
from lorakit.errors import RunFolderError, TrainingError, bullet_list
from lorakit.files import is_disk_full
from lorakit.records import RunSummary
from lorakit.training import recipe
from lorakit.training.checkpoint import Checkpoints, Facts
from lorakit.training.config import TrainConfig
from lorakit.training.data.encode import EncodedRow
from lorakit.training.estimate import foreseen
from lorakit.training.keeper import Keeper, SilentKeeper, Snapshot
from lorakit.training.keeping import FolderKeeper
from lorakit.training.loop import train
from lorakit.training.measuring import summarised, validation
from lorakit.training.observe import Observer
from lorakit.training.outset import attached, measured, memory_or_half, place_of, tried_packing
from lorakit.training.plan import Outcome
from lorakit.training.prefix.cached import CachedPrefix, kept_beside
from lorakit.training.prefix.trial import tried_prefix
from lorakit.training.prepare import Prepared
from lorakit.training.processes import Processes
from lorakit.training.proof import Reference, take_reference
from lorakit.training.recipe import plan_of
from lorakit.training.resolved import facts_of, hash_of_rows, resolved
from lorakit.training.run_files import read_start
from lorakit.training.run_folder import RunFolder
from lorakit.training.spec import TaskSpec
from lorakit.training.start import Start
from lorakit.training.tracking import tracked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "default"


@dataclass
class FitResult:
    """A finished run, ready to use.

    Attributes:
        model: the adapted model, the adapter acting.
        tokenizer: its tokenizer.
        handle: the adapters on it.
        spec: the task.
        summary: what was measured.
        folder: the run folder, or None if none was asked for.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    handle: Handle
    spec: TaskSpec
    summary: RunSummary
    folder: Path | None


class Session:
    """One run."""

    def __init__(
        self,
        prepared: Prepared,
        config: TrainConfig,
        observer: Observer,
        folder: RunFolder | None,
        processes: Processes,
    ) -> None:
        self.prepared, self.config, self.observer = prepared, config, observer
        self.folder, self.processes = folder, processes
        self.cached: CachedPrefix | None = None
        self.base, self.spec, self.task = prepared.base, prepared.spec, prepared.spec.kind
        self.collate = self.spec.collator(self.base.tokenizer)
        self.rows_hash = hash_of_rows(prepared) if config.output is not None else ""

    def begin(self, model: Any, rows: Any) -> FitResult:
        """Run from the first step."""
        settings = resolved(self.config, self.prepared, model, rows)

        def started(handle: Handle) -> tuple[Start, Snapshot | None]:
            start = Start(self.rows_hash, handle.identity(ADAPTER).short, tuple(self.prepared.recipe.choices))
            if self.folder is not None:
                self.folder.begin(settings, start, self.base.tokenizer if self.base.extended else None)
            return start, None

        return self._run(settings, started)

    def resume(self, place: Path, model: Any, rows: Any) -> FitResult:
        """Go on from the last whole checkpoint in ``place``."""
        settings = resolved(self.config, self.prepared, model, rows)

        def started(handle: Handle) -> tuple[Start, Snapshot | None]:
            facts = self._facts(settings, handle)
            start = read_start(place) or Start(facts.rows, facts.identity, tuple(self.prepared.recipe.choices))
            differences = facts.differences(dataclasses.replace(facts, rows=start.rows, identity=start.identity))
            if differences:
                raise RunFolderError(
                    f"run '{place}' cannot go on: {bullet_list(differences)}. Bring back what it was begun with, or "
                    "train anew with another --output."
                )
            self.prepared.recipe.choices[:] = start.choices
            snapshot, notes = Checkpoints(place).latest(facts)
            if snapshot is None:
                notes.append("There is no whole checkpoint: the run starts again from its first step.")
            for note in notes:
                self.observer.note(note)
            if self.folder is not None:
                lines = self.folder.go_on(snapshot.progress.num_lines if snapshot is not None else 0)
                self.folder.write("start.json", start)
                snapshot = None if snapshot is None else dataclasses.replace(snapshot, metrics=tuple(lines))
            return start, snapshot

        return self._run(settings, started)

    def _run(self, settings: dict[str, Any], started: Callable[[Handle], tuple[Start, Snapshot | None]]) -> FitResult:
        handle: Handle | None = None
        try:
            reference = self._reference()
            handle = attached(self.prepared, self.config, ADAPTER)
            prepared, where = self.prepared, (list(handle.entry(ADAPTER).targets), str(handle.coverage(ADAPTER)))
            recipe.say_method(self.config, prepared.recipe, prepared.method, *where)
            settings["packing"] = tried_packing(prepared, handle, ADAPTER)
            self.cached = tried_prefix(prepared, self.config, handle, ADAPTER, self.processes)
            settings["cache_prefix"] = self.cached is not None
            start, snapshot = started(handle)
            return self._trained(settings, handle, reference, start, snapshot)
        except BaseException:  # a model that was given is what it was
            if handle is not None:
                handle.detach()
            raise
        finally:
            if self.folder is not None:
                self.folder.end()

    def _trained(
        self,
        settings: dict[str, Any],
        handle: Handle,
        reference: Reference | None,
        start: Start,
        snapshot: Snapshot | None,
    ) -> FitResult:
        prepared, observer, folder = self.prepared, self.observer, self.folder
        observer.choices(prepared.recipe.choices)
        for note in prepared.notes:
            observer.note(note)
        asked = self.task.questions(self.base.tokenizer, prepared.held) if self.processes.main else ()
        memory = 0
        if self.processes.main:
            start = self._measured(handle, start, asked)
            memory = self._step_memory(handle)
            start = foreseen(prepared, self.config, handle, ADAPTER, self.processes.count, folder, start, observer)
        observer.stage("training")
        outcome = self._train(settings, handle, start, asked, snapshot)
        if outcome.interrupted and not outcome.steps:
            raise KeyboardInterrupt
        if outcome.best is not None and not outcome.interrupted and outcome.best_step != outcome.steps:
            handle.set_state(outcome.best, ADAPTER)
            outcome.notes.append(f"Kept the adapter of step {outcome.best_step:,}, the best on the validation rows.")
            observer.note(outcome.notes[-1])
        if folder is not None:
            observer.stage("saving the adapter")
            folder.save_adapter(self._named(handle), self.spec, self.base.revision)
        summary = None
        if self.processes.main:
            assert reference is not None
            size = (folder.path / "adapter_model.safetensors").stat().st_size if folder is not None else 0
            summary = summarised(prepared, handle, ADAPTER, start, asked, outcome, memory, size, reference, observer)
        device = next(self.base.model.parameters()).device
        summary = self.processes.from_main(RunSummary, summary, device)
        if folder is not None:
            template = self.base.tokenizer.chat_template
            folder.finish(summary, template if isinstance(template, str) else None)
        path = folder.path if folder is not None else None
        return FitResult(self.base.model, self.base.tokenizer, handle, self.spec, summary, path)

    def _reference(self) -> Reference | None:
        self.observer.stage("attaching the adapter")
        if not self.processes.main:
            return None
        return take_reference(self.base.model, self.prepared.held, self.collate, self.task)

    def _facts(self, settings: Mapping[str, Any], handle: Handle) -> Facts:
        return facts_of(settings, self.rows_hash, handle.identity(ADAPTER).short, self.processes.count)

    def _measured(self, handle: Handle, start: Start, asked: Sequence[EncodedRow]) -> Start:
        """Measure the untouched base, unless the run has done so before it was interrupted."""
        if start.before is not None:
            return start
        with handle.disabled():
            start = measured(self.prepared, start, asked, self.observer)
        if self.folder is not None:
            self.folder.write("start.json", start)
        return start

    def _step_memory(self, handle: Handle) -> int:
        """Measure a step on the longest micro-batch; where it does not fit, half of it is taken from step 1 on."""
        memory, halved = memory_or_half(self.prepared, handle, ADAPTER, self.config, self.processes.several)
        if halved:
            self.config = self.config.replaced(halve_micro_at=1)
            if self.folder is not None:
                self.folder.change_config(halve_micro_at=1)
            self.observer.note(self.prepared.notes[-1])
        return memory

    def _train(
        self,
        settings: Mapping[str, Any],
        handle: Handle,
        start: Start,
        asked: Sequence[EncodedRow],
        snapshot: Snapshot | None,
    ) -> Outcome:
        folder = self.folder
        if snapshot is not None:
            handle.set_state(snapshot.adapter, ADAPTER)
            self.observer.resumes(snapshot.progress.step, self.prepared.recipe.num_steps)
            self.prepared.notes.append(f"Resumed after step {snapshot.progress.step:,}.")
        keeper = self._keeper(self._facts(settings, handle), start)
        log_to = self.config.log_to if self.processes.main else None
        try:
            kept = kept_beside(self.cached, folder.path if folder is not None else None)
            with tracked(keeper, log_to, folder, settings, snapshot) as tracking, kept:
                return train(
                    handle,
                    ADAPTER,
                    self.task,
                    self.prepared.train,
                    self.collate,
                    plan_of(self.config, self.prepared.recipe),
                    self.observer,
                    validation(self.prepared, start, asked),
                    tracking,
                    self.processes,
                    snapshot,
                    self.cached,
                )
        except TrainingError as error:
            if folder is None or error.__cause__ is None or not is_disk_full(error.__cause__):
                raise
            place = folder.save_adapter(self._named(handle), self.spec, self.base.revision)
            raise TrainingError(
                f"{error} The adapter so far was saved whole in '{place}'. Once there is room, go on with: "
                f"lorakit resume {folder.path}"
            ) from error

    def _keeper(self, facts: Facts, start: Start) -> Keeper:
        if self.config.output is None:
            return Keeper()
        if self.folder is None:
            return SilentKeeper()
        checkpoints = Checkpoints(self.folder.path, self.config.keep)
        base = self.base.revision, place_of(self.base)
        return FolderKeeper(self.folder, checkpoints, facts, self.spec, *base, self.observer, start.planned)

    def _named(self, handle: Handle) -> AdapterState:
        return dataclasses.replace(handle.state(ADAPTER), base_name=place_of(self.base))
