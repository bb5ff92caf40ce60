"""Every error that lorakit raises on purpose, in one tree.

    LorakitError                what went wrong is ours, or the machine's         exit code 1
    +-- VerificationError       a proof failed: a base weight changed, a site is dead, ...
    +-- MergeToleranceError     merged and unmerged outputs differ by more than promised
    +-- TrainingError           a run cannot go on (non-finite loss, a full disk)
    +-- InputError              what was asked cannot be done as asked            exit code 2
        +-- ConfigError         a field, flag or config key is wrong
        +-- DataError           a file of examples, or a row of it, is wrong
        +-- ModelError          a base model is missing, broken or of an unfit kind
        +-- TargetError         a target matches nothing, or something that cannot be adapted
        +-- UnsupportedLayerError   a layer kind, or one of its options, that has no ops
        +-- ShapeError          tensors that do not fit each other
        +-- AdapterError        an adapter name that is unknown, taken or not allowed here
        +-- RoutingError        rows or positions whose adapter cannot be told
        +-- MergeError          a merge that cannot be exact, or an unmerge without originals
        +-- FormatError         a file that is not what it should be
        +-- BaseMismatchError   an adapter that belongs to another base
        +-- RunFolderError      a run folder that exists, is missing or is incomplete

A message says what was asked, what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LorakitError(Exception):
    """The root: catch it to catch every deliberate error of this library."""

    exit_code = 1


class VerificationError(LorakitError):
    """A proof failed: a base weight changed or a site does not move the output."""


class MergeToleranceError(LorakitError):
    """Merged and unmerged outputs differ by more than the stated tolerance."""


class TrainingError(LorakitError):
    """A run cannot go on: a non-finite loss, a full disk, no memory."""


class InputError(LorakitError):
    """What was asked cannot be done as asked; the message says what to change."""

    exit_code = 2


class ConfigError(InputError):
    """A field, flag or config key is unknown or has a value that is not allowed."""


class DataError(InputError):
    """A file of examples, or a row of it, is missing, empty or malformed."""


class ModelError(InputError):
    """A base model is missing, broken or of a kind that the task cannot use."""


class TargetError(InputError):
    """A target matches no layer, or one that cannot be adapted."""


class UnsupportedLayerError(InputError):
    """A layer kind, or one of its options, that no ``LayerOps`` covers."""


class ShapeError(InputError):
    """Tensors whose shapes do not fit each other."""


class AdapterError(InputError):
    """An adapter name that is unknown, already taken or not allowed here."""


class RoutingError(InputError):
    """Rows or positions of a batch whose adapter cannot be told."""


class MergeError(InputError):
    """A merge that cannot be exact, or an unmerge whose originals were not kept."""


class FormatError(InputError):
    """A file that is not what its name says, or that would lose something."""


class BaseMismatchError(InputError):
    """An adapter that belongs to another base model."""


class RunFolderError(InputError):
    """A run folder that exists already, is missing or is incomplete."""


def closest(word: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of ``options`` that look most like ``word``, best first."""
    unique = sorted(set(options))
    near = difflib.get_close_matches(word, unique, n=count, cutoff=0.5)
    if near:
        return near
    lowered = word.lower()
    return [option for option in unique if lowered in option.lower()][:count]


def did_you_mean(word: str, options: Iterable[str], count: int = 3) -> str:
    """Return `` Closest: 'a', 'b'.`` for a message, or an empty string where nothing is near."""
    near = closest(word, options, count)
    return f" Closest: {quoted(near)}." if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def quoted(words: Sequence[str], limit: int = 8) -> str:
    """Join words as ``'a', 'b'``; past ``limit`` the rest is counted: ``... and 3 more``."""
    shown = ", ".join(f"'{word}'" for word in words[:limit])
    rest = len(words) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def bullet_list(problems: Sequence[str]) -> str:
    """Lay out several problems, one a line; a single one stays on its line."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
