"""The switch between the fast paths and the plain one, for comparison."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, get_args

from lorakit.errors import ConfigError

Paths = Literal["fast", "plain"]

_chosen: Paths = "fast"


class Use:
    """A choice of paths; as a context manager it lasts as long as the block, else until the next one."""

    def __init__(self, paths: Paths, before: Paths) -> None:
        self.paths, self.before = paths, before

    def __enter__(self) -> Use:
        """Return itself: the choice is made already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Return to the paths from before."""
        use(self.before)


def use(paths: Paths) -> Use:
    """Compute on the fast paths ('fast', as from the start) or on the plain one ('plain'), in this process.

    >>> with use("plain"):
    ...     fast()
    False
    >>> fast()
    True

    Raises:
        ConfigError: another word.
    """
    global _chosen
    if paths not in get_args(Paths):
        raise ConfigError(f"kernels.use takes 'fast' or 'plain', not {paths!r}.")
    before, _chosen = _chosen, paths
    return Use(paths, before)


def fast() -> bool:
    """Tell whether the fast paths are used where they apply."""
    return _chosen == "fast"
