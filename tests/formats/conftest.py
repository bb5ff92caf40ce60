"""What peft and transformers say about themselves while they are the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def only_known_warnings() -> Iterator[None]:
    """Let pass what PEFT and transformers say about themselves; anything else stays an error."""
    with warnings.catch_warnings():
        # transformers 5 renamed the attribute that PEFT reads.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # PEFT corrects fan_in_fan_out per layer in models that have both kinds, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT saves a targeted embedding's base weight beside the update; the tests read such files.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        # PEFT heeds patterns for parameters, and says that it does not.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match any targeted")
        yield
