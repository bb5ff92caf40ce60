"""Silence around the calls into transformers: what matters in its chatter, lorakit says itself."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and progress bars inside the block, and restore both after it.

    Inside, transformers may not ask the hub to convert a pickled checkpoint either: that would be a
    request to a third party that nobody made.
    """
    import transformers

    chatter: Any = transformers.logging
    verbosity = chatter.get_verbosity()
    had_bars = chatter.is_progress_bar_enabled()
    conversion = os.environ.get(_CONVERSION)
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    os.environ[_CONVERSION] = "1"
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if had_bars:
            chatter.enable_progress_bar()
        if conversion is None:
            del os.environ[_CONVERSION]
        else:
            os.environ[_CONVERSION] = conversion
