"""``FolderKeeper``: a running loop's metrics and checkpoints in its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    ) -> None:
        self.folder, self.checkpoints, self.observer = folder, checkpoints, observer
        self.facts, self.spec, self.revision, self.base_name = facts, spec, revision, base_name

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
