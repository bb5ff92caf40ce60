"""``Start``: what was found before the first step; a resumed run takes it as it was."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.records import Choice, Evaluation, Planned


@dataclass(frozen=True)
class Start:
    """What was found before the first step; stored as ``start.json`` in the run folder.

    Attributes:
        rows: hash of the encoded rows; ``identity`` of the base.
        choices: every setting with its reason.
        before: the held-out rows through the untouched base; None until it has been measured.
        majority, probe: what a classifier must beat.
        answers: the base's answers to the questions.
        planned: what the run is expected to take; None for a run without a folder.
    """

    rows: str
    identity: str
    choices: tuple[Choice, ...]
    before: Evaluation | None = None
    majority: Evaluation | None = None
    probe: Evaluation | None = None
    answers: tuple[str, ...] = ()
    planned: Planned | None = None
