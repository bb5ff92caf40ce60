"""Held-out rows answered: the right answer beside the right question, and only questions that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorakit.training.data.encode import EncodedRow
from lorakit.training.data.read import table_from_rows
from lorakit.training.fit import FitResult
from lorakit.training.samples import answer, paired, probabilities, questions
from lorakit.training.spec import TaskSpec
from lorakit.training.tasks.classification import NUM_SHOWN

Fit = Callable[..., FitResult]
CLASSES = TaskSpec("classification", ("a", "b", "c"), separator="")


def rows_of_classes(*labels: str) -> list[EncodedRow]:
    return [EncodedRow([3], "abc".index(label), i, f"text {i}", label) for i, label in enumerate(labels)]


def test_rows_that_turned_right_come_first_one_of_each_class() -> None:
    rows = rows_of_classes("a", "a", "b", "c")
    before = ["b (0.5)", "a (0.5)", "a (0.5)", "c (0.5)"]
    after = ["a (0.9)", "a (0.9)", "b (0.9)", "c (0.9)"]
    shown = paired(before, after, rows, CLASSES)
    assert [(s.input, s.after) for s in shown[:3]] == [
        ("text 0", "a (0.9)"),
        ("text 2", "b (0.9)"),
        ("text 3", "c (0.9)"),
    ]


def test_one_answer_that_is_still_wrong_is_shown_too() -> None:
    rows = rows_of_classes(*"abc" * 5)
    after = [f"{row.expected} (0.9)" for row in rows[:-1]] + ["a (0.6)"]
    shown = paired(["b (0.4)"] * 15, after, rows, CLASSES)
    assert len(shown) == NUM_SHOWN
    assert [s.input for s in shown if s.after == "a (0.6)"] == ["text 14"]


def test_classes_that_no_held_row_has_leave_no_gap() -> None:
    rows = rows_of_classes("a", "a", "a", "b")
    shown = paired(["a (0.5)"] * 4, ["a (0.6)"] * 4, rows, CLASSES)
    assert len(shown) == 4


def test_probabilities_are_in_the_order_of_the_rows(build: Callable[[str], Any]) -> None:
    model = build("bert")
    rows = [EncodedRow(list(range(3, 4 + length)), 0, length, "", "a") for length in (3, 9, 1, 6)]
    found = probabilities(model, rows, CLASSES.collator(_Pads()))  # type: ignore[arg-type]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row.input_ids])).logits.softmax(-1) for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


class _Pads:
    """As much of a tokenizer as a collator asks for."""

    pad_token_id = 0


def generation_rows(tokenizer: Any, spec: TaskSpec, prompts: list[str]) -> tuple[EncodedRow, ...]:
    table = table_from_rows([{"prompt": prompt, "completion": "red"} for prompt in prompts])
    return spec.read(table, tokenizer).rows


def test_prompts_that_leave_no_room_are_passed_over_and_answers_stay_with_their_questions(
    build: Callable[[str], Any], tokenizer: Callable[[str], Any]
) -> None:
    model, words, spec = build("llama"), tokenizer("llama"), TaskSpec("generation", max_length=64)
    rows = generation_rows(words, spec, ["the red house", "the " * 50, "a blue boat", "the old car", "now"])
    asked = questions(words, spec, rows)
    answers = answer(model, words, spec, asked)
    shown = paired(answers, answers, asked, spec)

    assert [row.prompt for row in asked] == ["the red house", "a blue boat", "the old car"]
    assert [sample.input for sample in shown] == ["the red house", "a blue boat", "the old car"]
    assert shown[1].before == answer(model, words, spec, rows[2:3])[0]


@pytest.mark.parametrize("words_before", [0, 20, 40])
def test_what_a_chat_template_adds_counts(
    build: Callable[[str], Any], tokenizer: Callable[[str], Any], words_before: int
) -> None:
    words = tokenizer("llama-chat")
    words.chat_template = "the " * words_before + words.chat_template
    spec = replace(TaskSpec("generation", max_length=64), chat=True)
    rows = generation_rows(words, spec, ["the red house"])
    asked = questions(words, spec, rows)
    assert len(asked) == (words_before < 40)
    assert len(answer(build("llama"), words, spec, asked)) == len(asked)


def test_plain_text_is_asked_to_go_on_from_its_opening(quick_fit: Fit) -> None:
    result = quick_fit("llama", "written", max_steps=1)
    for sample in result.summary.samples:
        assert len(result.tokenizer(sample.input)["input_ids"]) <= 16
        assert sample.expected
    assert result.spec.separator == ""
