"""Encoded rows in batches: which rows together, in what order, as which tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lorakit.training.data.encode import IGNORED, EncodedRow

WINDOW_BATCHES = 16


@dataclass(frozen=True)
class Collator:
    """Turn encoded rows into tensors, padded on the right to a multiple of ``pad_to``.

    Attributes:
        pad_token_id: what ``input_ids`` is padded with.
        pad_to: widths are multiples of it, so that few shapes occur.
        encoder_decoder: the labels have a width of their own.
        max_length: never pad beyond it (the model has no more positions).
    """

    pad_token_id: int
    pad_to: int = 8
    encoder_decoder: bool = False
    max_length: int | None = None

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Collate a batch.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, T]``, ``labels`` ``[B, T]`` (padded with -100;
            ``[B, T']`` for encoder-decoders) or ``[B]`` for classes, all int64; ``token_type_ids`` if the
            rows have them.
        """
        ids = [row.input_ids for row in rows]
        width = self.width(max(len(row) for row in ids))
        batch = {
            "input_ids": _padded(ids, width, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], width, 0),
        }
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if types:
            batch["token_type_ids"] = _padded(types, width, 0)
        sequences = [row.labels for row in rows if isinstance(row.labels, list)]
        if sequences:
            label_width = self.width(max(len(row) for row in sequences)) if self.encoder_decoder else width
            batch["labels"] = _padded(sequences, label_width, IGNORED)
        else:
            batch["labels"] = torch.tensor([row.labels for row in rows])
        return batch

    def places(self, rows: Sequence[EncodedRow]) -> list[tuple[int, int]]:
        """Return the sequence that each row is in, and where it begins there."""
        return [(i, 0) for i in range(len(rows))]

    def width(self, longest: int) -> int:
        """Return the width of a batch whose longest row has so many tokens."""
        width = -(-longest // self.pad_to) * self.pad_to
        return width if self.max_length is None else max(longest, min(width, self.max_length))


class BatchOrder(Sampler[list[int]]):
    """Batches of one epoch in random order, rows of like length together; every row exactly once.

    All rows are shuffled and cut into windows of 16 batches; each window is sorted by length and cut into
    batches, and all batches are shuffled. The order is a function of ``(seed, epoch)`` alone. It serves as
    the ``batch_sampler`` of a ``DataLoader``.
    """

    drop_last = False

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, epoch: int = 0) -> None:
        """Take the number of tokens of each row, and what the order depends on."""
        self.lengths = tuple(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches, the last and shorter one included."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row numbers of each batch."""
        shuffler = random.Random(f"{self.seed}/{self.epoch}")
        rows = list(range(len(self.lengths)))
        shuffler.shuffle(rows)
        window = WINDOW_BATCHES * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(rows), window):
            alike = sorted(rows[start : start + window], key=lambda row: self.lengths[row])
            batches += _cut(alike, self.batch_size)
        shuffler.shuffle(batches)
        return iter(batches)


def ordered_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut the rows into batches by length, longest first: the most memory is needed at once or never."""
    return _cut(sorted(range(len(lengths)), key=lambda row: -lengths[row]), batch_size)


def _cut(rows: Sequence[int], batch_size: int) -> list[list[int]]:
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _padded(sequences: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    tensor = torch.full((len(sequences), width), value, dtype=torch.int64)
    for row, sequence in zip(tensor, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return tensor
