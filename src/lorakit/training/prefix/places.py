"""Where the states of each row are in the file, and which rows' states are computed together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import TrainingError
from lorakit.files import is_disk_full
from lorakit.training.data.encoded import EncodedRow

MOST_TOKENS = 8192
"""Computed together at most."""


class Places:
    """The different rows of a training, one behind the other.

    A row is known by its tokens: labels and numbers do not reach the model's blocks. Rows of like length are computed
    together, always the same ones, so that their states are the same bits in a run that is resumed.

    Attributes:
        num_tokens: of all different rows.
        groups: which slots are computed together.
        rows: for each slot a row that has its tokens, by its place among those given.
    """

    def __init__(self, rows: Sequence[EncodedRow], micro_batch: int) -> None:
        """Give each of ``rows`` a slot; so many tokens are computed together as ``micro_batch`` rows may have."""
        self.rows = array("q")
        self._slots: dict[bytes, int] = {}
        lengths = array("q")
        for number, row in enumerate(rows):
            key = _content(row)
            if key not in self._slots:
                self._slots[key] = len(lengths)
                self.rows.append(number)
                lengths.append(len(row.input_ids))
        self._starts = array("q", accumulate(lengths, initial=0))
        self.num_tokens = self._starts[-1]
        self.groups = _groups(lengths, min(MOST_TOKENS, micro_batch * max(lengths)))
        self._group = array("q", [0] * len(lengths))
        for group, slots in enumerate(self.groups):
            for slot in slots:
                self._group[slot] = group

    def slots(self, rows: Sequence[EncodedRow]) -> list[int]:
        """Return the slot of each row."""
        return [self._slots[_content(row)] for row in rows]

    def group(self, slot: int) -> int:
        """Return the number of the group that a slot is computed in."""
        return self._group[slot]

    def span(self, slot: int) -> slice:
        """Return which tokens of the file a slot's are."""
        return slice(self._starts[slot], self._starts[slot + 1])


def _content(row: EncodedRow) -> bytes:
    types = row.token_type_ids or ()
    return hashlib.blake2b(array("q", (*row.input_ids, -1, *types)).tobytes(), digest_size=16).digest()


def _groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Cut rows by length, the longest first, into groups of ``most`` tokens with padding, but one row at least."""
    groups: list[list[int]] = []
    for slot in sorted(range(len(lengths)), key=lambda slot: -lengths[slot]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > most:
            groups.append([])
        groups[-1].append(slot)
    return groups


@contextlib.contextmanager
def on_disk(folder: Path, num_tokens: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Give ``[num_tokens, width]`` numbers that are kept in a file, mapped to memory.

    The file has no name from the beginning on: the system frees its space when the block ends, and where the process
    does, in whatever way. All of the space is claimed here, since a write to a mapped file cannot fail later.

    Raises:
        TrainingError: there is not enough room.
    """
    num_bytes = num_tokens * width * dtype.itemsize
    handle, name = tempfile.mkstemp(prefix=".prefix-", dir=folder)
    try:
        if sys.platform == "linux":
            os.posix_fallocate(handle, 0, num_bytes)
        else:
            os.truncate(handle, num_bytes)
        numbers = torch.from_file(name, shared=True, size=num_tokens * width, dtype=dtype)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise TrainingError(
            f"the disk is full: {num_bytes / 2**20:,.1f} MiB for cache_prefix cannot be had in '{folder}'. Free some "
            "space, or leave cache_prefix out."
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()
    found = numbers.view(num_tokens, width)
    del numbers
    try:
        yield found
    finally:
        found.set_()  # type: ignore[call-overload]
