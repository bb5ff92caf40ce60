"""Rows held back for validation, and the list of classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.training.data.detect import detect_task
from lorakit.training.data.read import Table, read_splits, read_table, table_from_rows
from lorakit.training.data.split import label_names, split_rows


def labelled(counts: dict[Any, int]) -> Table:
    return table_from_rows(
        {"text": f"text {label} {index}", "label": label} for label, n in counts.items() for index in range(n)
    )


def split(table: Table, **settings: Any) -> tuple[Table, Table]:
    return split_rows(table, detect_task(table), **settings)


def per_class(table: Table) -> Counter[str]:
    return Counter(row.fields["label"] for row in table.rows)


def names(*tables: Table) -> tuple[str, ...]:
    splits = dict(zip(("train", "test"), tables, strict=False))
    return label_names(splits, detect_task(tables[0]))


def test_every_row_is_on_one_side_in_the_old_order() -> None:
    table = labelled({"a": 50, "b": 50})
    train, validation = split(table)

    numbers = [row.number for row in train.rows], [row.number for row in validation.rows]
    assert sorted(numbers[0] + numbers[1]) == [row.number for row in table.rows]
    assert numbers == (sorted(numbers[0]), sorted(numbers[1]))


def test_each_class_gives_its_share() -> None:
    _, validation = split(labelled({"a": 100, "b": 50, "c": 20}), fraction=0.1)

    assert per_class(validation) == {"a": 10, "b": 5, "c": 2}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 1.0])
def test_each_class_keeps_a_row_for_training(fraction: float) -> None:
    train, validation = split(labelled({"a": 20, "b": 2, "c": 1}), fraction=fraction)

    assert set(per_class(train)) == {"a", "b", "c"}
    assert validation.rows


def test_the_seed_alone_decides() -> None:
    table = labelled({"a": 60, "b": 60})

    assert split(table, seed=1) == split(table, seed=1)
    assert split(table, seed=1) != split(table, seed=2)


def test_validation_has_no_more_than_the_largest_number_of_rows() -> None:
    _, validation = split(labelled({"a": 300, "b": 300}), fraction=0.5, max_rows=40)

    assert len(validation.rows) == 40


@pytest.mark.parametrize(
    ("rows", "given"),
    [
        ([{"text": f"t{i % 30}", "label": "ab"[i % 30 % 2]} for i in range(120)], "text"),
        ([{"prompt": f"p{i % 30}", "completion": f"c{i}"} for i in range(120)], "prompt"),
        ([{"instruction": "same", "input": f"p{i % 30}", "output": f"c{i}"} for i in range(120)], "input"),
    ],
)
def test_one_input_is_never_on_both_sides(rows: list[dict[str, str]], given: str) -> None:
    train, validation = split(table_from_rows(rows))

    sides = [{row.fields[given] for row in side.rows} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert 4 <= len(validation.rows) <= 12  # whole groups of four, within a tenth of the rows


def test_inputs_that_differ_by_case_and_space_are_the_same() -> None:
    rows = [
        {"prompt": f"p {i}{'  ' * (j % 2)}".upper() if j else f"P {i}", "completion": str(j)}
        for i in range(10)
        for j in range(2)
    ]
    train, validation = split(table_from_rows(rows))

    sides = [{row.fields["prompt"].strip() for row in side.rows} for side in (train, validation)]
    assert not sides[0] & sides[1]


def test_conversations_are_the_same_by_what_comes_before_the_first_answer() -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i % 5}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(20)
    ]
    train, validation = split(table_from_rows(rows))

    sides = [{row.fields["messages"][0]["content"] for row in side.rows} for side in (train, validation)]
    assert not sides[0] & sides[1]


def test_an_input_with_two_labels_stays_in_training() -> None:
    doubtful = [{"text": "both", "label": label} for label in ("a", "b")] * 5
    table = table_from_rows([*doubtful, *(row.fields for row in labelled({"a": 10, "b": 10}).rows)])
    _, validation = split(table, fraction=0.5)

    assert all(row.fields["text"] != "both" for row in validation.rows)


def test_fewer_than_four_rows_are_refused() -> None:
    with pytest.raises(DataError, match="has 3 rows; at least 4"):
        split(labelled({"a": 2, "b": 1}))


def test_rows_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="no row can be held back"):
        split(table_from_rows([{"prompt": "p", "completion": "c"}] * 8))


def test_four_rows_are_enough() -> None:
    train, validation = split(labelled({"a": 2, "b": 2}))

    assert (len(train.rows), len(validation.rows)) == (3, 1)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("false", "true")),
        ([" a", "a ", "b"], ("a", "b")),
        (["2", "x"], ("2", "x")),
    ],
)
def test_labels_are_sorted_by_name_or_number(labels: list[Any], expected: tuple[str, ...]) -> None:
    assert names(table_from_rows({"text": f"t{i}", "label": v} for i, v in enumerate(labels))) == expected


def test_one_class_only_is_refused() -> None:
    with pytest.raises(DataError, match=r"every 'label' is 'a'\. At least two classes"):
        names(labelled({"a": 5}))


def test_free_text_as_label_is_refused() -> None:
    with pytest.raises(DataError, match="'label' has 60 different values in 60 rows"):
        names(table_from_rows({"text": f"t{i}", "label": f"words {i}"} for i in range(60)))


def test_many_classes_of_many_rows_are_taken() -> None:
    assert len(names(labelled({f"c{i}": 3 for i in range(60)}))) == 60


def test_labels_that_training_never_sees_are_named_with_their_rows() -> None:
    with pytest.raises(DataError, match=r"record 3: label 'c'\. .* which has 'a', 'b'"):
        names(labelled({"a": 3, "b": 3}), labelled({"a": 2, "c": 1}))


def test_real_questions_split_with_every_class_on_both_sides(shared: Path) -> None:
    tables = read_splits(shared / "data" / "trec")
    train, validation = split(tables["train"])

    assert set(per_class(train)) == set(per_class(validation)) == set(names(*tables.values()))
    assert len(validation.rows) == pytest.approx(544, abs=6)  # a tenth, in whole groups of equal questions


def test_real_prompts_are_never_on_both_sides(shared: Path) -> None:
    train, validation = split(read_table(shared / "data" / "e2e" / "valid.jsonl"))

    prompts = [{row.fields["prompt"] for row in side.rows} for side in (train, validation)]
    assert not prompts[0] & prompts[1]
