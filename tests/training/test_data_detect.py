"""The task is found from the columns, or refused with what was found and what would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError
from lorakit.training.data.columns import parse_columns
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

    assert found.reason == "texts with a label in 'text', 'label', 1 rows; not used: 'id'"


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
        ({"text": "x", "label": "a"}, {"text": 5, "label": "b"}, "'text' is a number, not a text"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": 0.5}, r"'label' is 0\.5: a class needs"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": ["a"]}, "'label' is a list, not a class name"),
        ({"text": "x"}, {"text": "\ud83d"}, "'text' holds half of a surrogate pair at character 1"),
        (
            {"instruction": "x", "output": "y"},
            {"instruction": "x", "output": "y", "input": 3},
            "'input' is a number",
        ),
        ({"messages": TALK}, {"messages": [{"role": "narrator", "content": "x"}]}, "message 1 has the role 'narrator'"),
        ({"messages": TALK}, {"messages": "hello"}, "'messages' must be a list .*: Expecting value"),
        ({"messages": TALK}, {"messages": {"role": "user"}}, "'messages' must be a list"),
        (
            {"messages": TALK},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            r"message 1 \(user\) has a part of type 'image_url'; only text",
        ),
        (
            {"conversations": TALK, "tools": ""},
            {"conversations": TALK, "tools": "[{"},
            "'tools' must be a list of function descriptions: .* at character",
        ),
        (
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            {"instruction": "x", "output": "y", "history": ["a", "b"]},
            "'history' is not a list of .question, answer. pairs",
        ),
        (
            {"messages": TALK, "system": "a"},
            {"messages": [{"role": "system", "content": "b"}, *TALK], "system": "a"},
            "both a system message and another text",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(good: dict[str, Any], bad: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"rows, record 2: {problem}"):
        detect_task(table(good, bad))


@pytest.mark.parametrize(
    ("good", "empty", "reason"),
    [
        ({"text": "x", "label": "a"}, {"text": " ", "label": "b"}, "'text' is empty"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": ""}, "'label' is empty"),
        ({"text": "x", "label": "a"}, {"text": "y", "label": None}, "'label' is empty"),
        ({"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}, "'completion' is empty"),
        ({"instruction": "x", "output": "y", "input": None}, {"instruction": "x", "output": "\n"}, "'output' is empty"),
        ({"messages": TALK}, {"messages": TALK[:1]}, "no assistant turn"),
        ({"messages": TALK}, {"messages": TALK[1:]}, "no assistant turn to learn"),
        ({"messages": TALK}, {"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "no assistant turn to learn"),
        ({"messages": TALK}, {"messages": []}, "'messages' is empty"),
        (
            {"messages": TALK},
            {"messages": [TALK[0], {"role": "assistant", "content": None}]},
            r"message 2 \(assistant\)",
        ),
    ],
)
def test_a_row_that_teaches_nothing_is_skipped_and_said(
    good: dict[str, Any], empty: dict[str, Any], reason: str
) -> None:
    found = detect_task(table(good, empty, good))

    assert [number for number, _ in found.skipped] == [2]
    assert re.search(f", 3 rows, 1 skipped: {reason}.* \\(record 2\\)", found.reason)


def test_more_than_half_skipped_is_refused_with_their_numbers() -> None:
    rows = [{"text": "x", "label": label} for label in ("a", "", None)]

    with pytest.raises(DataError, match=r"2 of 3 rows have nothing to learn from: 'label' is empty \(records 2, 3\)"):
        detect_task(table(*rows))


def test_layouts_mixed_in_one_file_are_refused_with_their_rows() -> None:
    rows = [{"messages": TALK}, {"prompt": "x", "completion": "y"}, {"messages": TALK}]

    with pytest.raises(DataError, match=r"chat messages in records 1, 3; prompts with completions in record 2"):
        detect_task(table(*rows))


def test_layouts_of_several_tasks_mixed_in_one_file_are_refused_with_their_rows() -> None:
    rows = [{"text": "x", "label": "a"}, {"prompt": "x", "completion": "y"}]

    with pytest.raises(DataError, match=r"mixes layouts: texts with a label in record 1; prompts"):
        detect_task(table(*rows))


@pytest.mark.parametrize(
    ("row", "layout", "columns"),
    [
        ({"question": "x", "answer": "y"}, "prompt-completion", {"prompt": "question", "completion": "answer"}),
        ({"query": "x", "response": "y"}, "prompt-completion", {"prompt": "query", "completion": "response"}),
        ({"input": "x", "target": "y"}, "prompt-completion", {"prompt": "input", "completion": "target"}),
        ({"source": "x", "target": "y"}, "prompt-completion", {"prompt": "source", "completion": "target"}),
        (
            {"question": "x", "answer": "y", "source": "web"},
            "prompt-completion",
            {"prompt": "question", "completion": "answer"},
        ),
        (
            {"instruction": "x", "context": "", "response": "y", "category": "qa"},
            "instruction-output",
            {"instruction": "instruction", "output": "response", "input": "context"},
        ),
        (
            {"question": "x", "context": "z", "answer": "y"},
            "instruction-output",
            {"instruction": "question", "input": "context", "output": "answer"},
        ),
        ({"conversations": TALK, "id": "7"}, "messages", {"messages": "conversations"}),
        (
            {"conversations": TALK, "system": "s", "tools": "[]"},
            "messages",
            {"messages": "conversations", "system": "system", "tools": "tools"},
        ),
        (
            {"instruction": "x", "input": "", "output": "y", "history": [["a", "b"]]},
            "messages",
            {"instruction": "instruction", "output": "output", "input": "input", "history": "history"},
        ),
        (
            {"instruction": "x", "input": "", "output": "y", "history": [], "system": ""},
            "instruction-output",
            {"instruction": "instruction", "output": "output", "input": "input"},
        ),
        (
            {"prompt": [TALK[0]], "completion": [TALK[1]]},
            "messages",
            {"prompt": "prompt", "completion": "completion"},
        ),
    ],
)
def test_names_of_common_sets_are_known(row: dict[str, Any], layout: str, columns: dict[str, str]) -> None:
    found = detect_task(table(row, row), "generation")

    assert (found.layout, found.columns) == (layout, columns)


def test_sharegpt_is_said() -> None:
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]

    found = detect_task(table({"conversations": talk}))
    assert found.reason == "ShareGPT conversations in 'conversations', 1 rows"


@pytest.mark.parametrize(
    ("columns", "task", "layout", "found"),
    [
        ({"prompt": "q", "completion": "a"}, "generation", "prompt-completion", {"prompt": "q", "completion": "a"}),
        ({"text": "q", "label": "a"}, "classification", "text-label", {"text": "q", "label": "a"}),
        ({"text": "q"}, "language-modeling", "text", {"text": "q"}),
    ],
)
def test_a_mapping_names_the_columns_of_anything(
    columns: dict[str, str], task: str, layout: str, found: dict[str, str]
) -> None:
    detection = detect_task(table({"q": "x", "a": "y", "z": 1}), columns=columns)

    assert (detection.task, detection.layout, detection.columns) == (task, layout, found)


def test_a_mapping_goes_before_names_that_would_be_known() -> None:
    rows = table({"prompt": "x", "completion": "y", "better": "z"})

    assert detect_task(rows, columns={"completion": "better"}).columns == {"prompt": "prompt", "completion": "better"}


def test_a_mapping_can_leave_a_column_out() -> None:
    rows = table({"messages": TALK, "tools": "[]"})

    assert detect_task(rows, columns={"tools": ""}).columns == {"messages": "messages"}


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"promt": "q"}, "no layout has the field 'promt'.*Closest: 'prompt'"),
        ({"prompt": "Q", "completion": "a"}, "has no column 'Q'. It has 'q', 'a'"),
    ],
)
def test_a_mapping_to_what_is_not_there_is_refused(columns: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        detect_task(table({"q": "x", "a": "y"}), columns=columns)


def test_preferences_are_told_how_to_learn_from_the_chosen() -> None:
    with pytest.raises(DataError, match="--columns completion=chosen"):
        detect_task(table({"prompt": "x", "chosen": "y", "rejected": "z"}))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prompt=question, completion=answer", {"prompt": "question", "completion": "answer"}),
        ("tools=", {"tools": ""}),
        ("", None),
    ],
)
def test_a_mapping_is_read_from_text(text: str, found: dict[str, str] | None) -> None:
    assert parse_columns(text) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [("prompt", "'prompt' is not 'field=column'"), ("text=a,text=b", "'text' is given twice")],
)
def test_a_mapping_that_cannot_be_read_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_columns(text)


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


def documented() -> list[str]:
    page = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    return [line.strip() for line in lines if line.startswith("    {")]


@pytest.mark.parametrize("line", documented())
def test_every_row_of_the_page_on_data_is_recognised(line: str) -> None:
    assert detect_task(table(json.loads(line))).skipped == ()
