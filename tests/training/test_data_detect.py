"""The task is found from the columns, or refused with what was found and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError
from lorakit.training.data.detect import detect_task
from lorakit.training.data.read import Table, read_splits, read_table, table_from_rows

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def table(*rows: dict[str, Any]) -> Table:
    return table_from_rows(rows)


@pytest.mark.parametrize(
    ("row", "task", "layout", "columns"),
    [
        ({"text": "x", "label": "a"}, "classification", "text-label", {"text": "text", "label": "label"}),
        (
            {"Sentence": "x", "Class": 1},
            "classification",
            "text-label",
            {"text": "Sentence", "label": "Class"},
        ),
        (
            {"message": "x", "intent": "a"},
            "classification",
            "text-label",
            {"text": "message", "label": "intent"},
        ),
        (
            {"premise": "x", "hypothesis": "y", "label": True, "idx": 3},
            "classification",
            "pair-label",
            {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        ),
        (
            {"text": "x", "text_pair": "y", "label": 0},
            "classification",
            "pair-label",
            {"text": "text", "text_pair": "text_pair", "label": "label"},
        ),
        (
            {"prompt": "x", "completion": "y"},
            "generation",
            "prompt-completion",
            {"prompt": "prompt", "completion": "completion"},
        ),
        (
            {"prompt": "x", "response": "y", "id": 1},
            "generation",
            "prompt-completion",
            {"prompt": "prompt", "completion": "response"},
        ),
        (
            {"instruction": "x", "input": "", "output": "y"},
            "generation",
            "instruction-output",
            {"instruction": "instruction", "output": "output", "input": "input"},
        ),
        (
            {"instruction": "x", "output": "y"},
            "generation",
            "instruction-output",
            {"instruction": "instruction", "output": "output"},
        ),
        ({"messages": TALK, "source": "z"}, "generation", "messages", {"messages": "messages"}),
        ({"text": "x"}, "language-modeling", "text", {"text": "text"}),
    ],
)
def test_columns_tell_the_task(row: dict[str, Any], task: str, layout: str, columns: dict[str, str]) -> None:
    found = detect_task(table(row, row))

    assert (found.task, found.layout, found.columns) == (task, layout, columns)


def test_the_reason_names_the_columns_used_and_those_left_aside() -> None:
    found = detect_task(table({"text": "x", "label": "a", "id": 7}))

    assert found.reason == "the data has 'text', 'label'; not used: 'id'"


def test_an_exact_name_goes_before_other_names_for_it() -> None:
    found = detect_task(table({"text": "x", "content": "y", "label": "a", "category": "b"}))

    assert found.columns == {"text": "text", "label": "label"}


def test_a_task_may_be_asked_for_where_several_fit() -> None:
    rows = table({"text": "x", "label": "a", "prompt": "p", "completion": "c"})

    with pytest.raises(DataError, match=r"fit 'classification', 'generation'\. Say which is meant with --task"):
        detect_task(rows)
    assert detect_task(rows, "generation").layout == "prompt-completion"
    assert detect_task(rows, "classification").layout == "text-label"
    assert detect_task(rows, "language-modeling").columns == {"text": "text"}


def test_text_beside_an_unknown_column_is_not_taken_for_language_modeling() -> None:
    rows = table({"text": "x", "sentiment": "good"})

    with pytest.raises(DataError, match=r"(?s)'text', 'sentiment' fit no task.*--task language-modeling"):
        detect_task(rows)


def test_an_asked_task_that_the_columns_lack_is_refused_with_the_closest() -> None:
    with pytest.raises(
        DataError,
        match=r"(?s)'text', 'lable' do not fit the task 'classification'.*"
        r"'lable': Closest: 'label'.*'text' \(or .*\+ 'label' \(or 'labels'",
    ):
        detect_task(table({"text": "x", "lable": "a"}), "classification")


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'clasification'.*Closest: 'classification'"):
        detect_task(table({"text": "x"}), "clasification")


def test_two_columns_that_could_be_the_text_are_refused() -> None:
    with pytest.raises(DataError, match="the text for classification could be 'question', 'sentence'"):
        detect_task(table({"question": "x", "sentence": "y", "label": "a"}))


def test_a_csv_without_column_names_is_told_what_its_first_line_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("I like it,1\nNo good,0\n")

    with pytest.raises(DataError, match=r"(?s)'I like it', '1' fit no task.*first line .* column names"):
        detect_task(read_table(path))


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ({"text": "x", "label": "a"}, {"text": "y"}, "no 'label'"),
        ({"text": "x", "label": "a"}, {"label": "b"}, "no 'text'"),
        ({"text": "x", "label": "a"}, {"text": " ", "label": "b"}, "'text' is empty"),
        ({"text": "x", "label": "a"}, {"text": 5, "label": "b"}, "'text' is a number, not a text"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": ""}, "'label' is empty"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": 0.5}, r"'label' is 0\.5: a class needs"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": ["a"]}, "'label' is a list, not a class name"),
        ({"text": "x"}, {"text": "\ud83d"}, "'text' holds half of a surrogate pair at character 1"),
        ({"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}, "no 'completion'"),
        ({"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": ""}, "'completion' is empty"),
        (
            {"instruction": "x", "output": "y", "input": None},
            {"instruction": "x", "output": ""},
            "'output' is empty",
        ),
        (
            {"instruction": "x", "output": "y"},
            {"instruction": "x", "output": "y", "input": 3},
            "'input' is a number",
        ),
        ({"messages": TALK}, {"messages": TALK[:1]}, "no message is the assistant's"),
        ({"messages": TALK}, {"messages": None}, "no 'messages'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(good: dict[str, Any], bad: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"rows, record 2: {problem}"):
        detect_task(table(good, bad))


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y", "label": "a"}\n\n{"label": "a"}\n')

    with pytest.raises(DataError, match=r"(?s)2 rows cannot be used.*line 1: no 'label'.*line 4: no 'text'"):
        detect_task(read_table(path))


def test_labels_of_every_plain_kind_are_taken() -> None:
    rows = table(*({"text": "x", "label": label} for label in ("a", 1, True, 0, False)))

    assert detect_task(rows).task == "classification"


@pytest.mark.parametrize(
    ("place", "layout"),
    [
        ("trec", "text-label"),
        ("e2e/valid.jsonl", "prompt-completion"),
        ("instruct/alpaca_en.json", "instruction-output"),
        ("instruct/identity.json", "instruction-output"),
    ],
)
def test_real_files_are_recognised(shared: Path, place: str, layout: str) -> None:
    assert detect_task(read_splits(shared / "data" / place)["train"]).layout == layout
