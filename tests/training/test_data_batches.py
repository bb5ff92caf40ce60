"""Batches: every row once, the same order for the same seed, and tensors padded as stated."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lorakit.training.data.batches import BatchOrder, Collator, ordered_batches
from lorakit.training.data.encode import EncodedRow

LENGTHS = [(index * 37) % 101 + 1 for index in range(403)]


def row(ids: list[int], labels: list[int] | int, types: list[int] | None = None) -> EncodedRow:
    return EncodedRow(ids, labels, 1, "", "", types)


def test_sequences_are_padded_on_the_right_to_a_multiple() -> None:
    batch = Collator(pad_token_id=9, pad_to=4)([row([1, 2, 3, 4, 5], [-100, 2, 3, 4, 5]), row([6], [6])])

    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, 9, 9, 9, 9, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, 2, 3, 4, 5, -100, -100, -100],
        [6, -100, -100, -100, -100, -100, -100, -100],
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_classes_are_one_label_a_row() -> None:
    batch = Collator(pad_token_id=0)([row([1, 2], 1), row([3], 0)])

    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].shape == (2, 8)
    assert "token_type_ids" not in batch


def test_token_types_are_passed_on_where_rows_have_them() -> None:
    batch = Collator(pad_token_id=0, pad_to=1)([row([1, 2], 1, [0, 1]), row([3], 0, [0])])

    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]


def test_encoder_decoder_labels_have_a_width_of_their_own() -> None:
    batch = Collator(pad_token_id=0, pad_to=4, encoder_decoder=True)([row([1] * 5, [2]), row([1], [3, 4])])

    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"].tolist() == [[2, -100, -100, -100], [3, 4, -100, -100]]


def test_padding_never_passes_the_models_positions() -> None:
    batch = Collator(pad_token_id=0, pad_to=8, max_length=10)([row([1] * 9, [1] * 9)])

    assert batch["input_ids"].shape == (1, 10)


@pytest.mark.parametrize("batch_size", [1, 8, 403, 500])
def test_every_row_comes_exactly_once(batch_size: int) -> None:
    order = BatchOrder(LENGTHS, batch_size, seed=1, epoch=0)
    batches = list(order)

    assert sorted(index for batch in batches for index in batch) == list(range(403))
    assert len(batches) == len(order) == -(-403 // batch_size)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        return list(BatchOrder(LENGTHS, 8, seed, epoch))

    assert batches(1, 2) == batches(1, 2)
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)


def test_an_order_can_be_read_twice() -> None:
    order = BatchOrder(LENGTHS, 8)

    assert list(order) == list(order)


def test_rows_of_like_length_are_together_but_not_in_order_of_length() -> None:
    """Padding to the longest row of each batch costs far less than with batches drawn blindly."""

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)

    batches = list(BatchOrder(LENGTHS, 8, seed=0))
    blind = [list(range(start, min(start + 8, 403))) for start in range(0, 403, 8)]
    longest = [max(LENGTHS[index] for index in batch) for batch in batches]

    assert padded(batches) < 1.2 * sum(LENGTHS) < padded(blind)
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_evaluation_starts_with_the_longest_rows() -> None:
    batches = ordered_batches(LENGTHS, 16)
    lengths = [LENGTHS[index] for batch in batches for index in batch]

    assert lengths == sorted(LENGTHS, reverse=True)
    assert sorted(index for batch in batches for index in batch) == list(range(403))


def test_both_orders_serve_as_batch_sampler_of_a_data_loader() -> None:
    rows = [row([index] * length, index) for index, length in enumerate(LENGTHS)]
    collate = Collator(pad_token_id=0)
    samplers = (BatchOrder(LENGTHS, 32, seed=5), ordered_batches(LENGTHS, 32))

    for sampler in samplers:
        loader = DataLoader(rows, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
        assert sorted(int(label) for batch in loader for label in batch["labels"]) == list(range(403))
