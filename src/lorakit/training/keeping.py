"""``FolderKeeper``: a running loop's metrics and checkpoints in its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.records import Planned, to_json
from lorakit.training.checkpoint import Checkpoints, Facts
from lorakit.training.keeper import Keeper, Snapshot
from lorakit.training.observe import Observer
from lorakit.training.run_folder import RunFolder
from lorakit.training.spec import TaskSpec


class FolderKeeper(Keeper):
    """Leaves metrics and checkpoints in a run folder."""

    saves = True

    def __init__(
        self,
        folder: RunFolder,
        checkpoints: Checkpoints,
        facts: Facts,
        spec: TaskSpec,
        revision: str | None,
        base_name: str,
        observer: Observer,
        planned: Planned | None = None,
    ) -> None:
        """Keep a run's metrics, what was ``planned`` for it as their first line, and its checkpoints."""
        self.folder, self.checkpoints, self.observer = folder, checkpoints, observer
        self.facts, self.spec, self.revision, self.base_name = facts, spec, revision, base_name
        self.planned = planned

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """Return what was planned, as a line."""
        if self.planned is None:
            return ()
        return ({"kind": "plan", "step": 0, "loss": None, **to_json(self.planned)},)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        self.folder.log(line)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; from now on there is something to show of this run."""
        self.folder.flush()
        place = self.checkpoints.write(snapshot, self.facts, self.spec, self.revision, self.base_name)
        self.folder.is_saved()
        self.observer.checkpointed(snapshot.progress.step, str(place))

    def backed_off(self, step: int) -> None:
        """Write the step into config.yaml, so that a resumed run, or one like it, does the same."""
        self.folder.change_config(halve_micro_at=step)
