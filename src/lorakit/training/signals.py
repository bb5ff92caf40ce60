"""Ctrl-C and SIGTERM during a training: the first ends it after the step at hand, a second one at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Remembers signals.

    Attributes:
        asked: a signal has come: end after the step at hand.
    """

    def __init__(self) -> None:
        self.asked = False
        self._again = False
        self._held = False

    def heard(self, signum: int, frame: Any) -> None:
        """Take a signal: note the first one, raise KeyboardInterrupt at a second one unless held back."""
        if not self.asked:
            self.asked = True
        elif self._held:
            self._again = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block nothing is interrupted: a second signal counts at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._again:
            self._again = False
            raise KeyboardInterrupt


@contextlib.contextmanager
def noticed() -> Iterator[Interrupts]:
    """Hear SIGINT and SIGTERM within the block; only the main thread can, in another one nothing is heard."""
    found = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.signal(number, found.heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
