"""The column layouts that lorakit understands, and how a row's fields are read once one is chosen.

    task               layout              fields (and the column names they may have)
    classification     pair-label          text + text_pair + label
    classification     text-label          text + label
    generation         messages            messages: a list of {"role", "content"}, as OpenAI's API has it
    generation         prompt-completion   prompt + completion (response)
    generation         instruction-output  instruction + output (response), input (context) may be empty
    language-modeling  text                text

Column names are compared without regard to case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import quoted
from lorakit.training.data.table import Row

CLASSIFICATION = "classification"
GENERATION = "generation"
LANGUAGE_MODELING = "language-modeling"
TASKS = (CLASSIFICATION, GENERATION, LANGUAGE_MODELING)

TEXT_NAMES = ("text", "sentence", "content", "message", "question")
LABEL_NAMES = ("label", "labels", "intent", "category", "class")


@dataclass(frozen=True)
class Layout:
    """Fields that make up an example of ``task``, each with the column names it may have, best first."""

    name: str
    task: str
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the needed columns for a message: ``'text' + 'label' (or 'labels', 'intent')``."""
        parts = []
        for name, names in self.needed.items():
            others = [other for other in names if other != name]
            parts.append(f"'{name}'" + (f" (or {quoted(others)})" if others else ""))
        return " + ".join(parts)


LAYOUTS = (
    Layout(
        "pair-label",
        CLASSIFICATION,
        {
            "text": ("text", "sentence1", "premise"),
            "text_pair": ("text_pair", "sentence2", "hypothesis"),
            "label": LABEL_NAMES,
        },
    ),
    Layout("text-label", CLASSIFICATION, {"text": TEXT_NAMES, "label": LABEL_NAMES}),
    Layout("messages", GENERATION, {"messages": ("messages",)}),
    Layout("prompt-completion", GENERATION, {"prompt": ("prompt",), "completion": ("completion", "response")}),
    Layout(
        "instruction-output",
        GENERATION,
        {"instruction": ("instruction",), "output": ("output", "response")},
        {"input": ("input", "context")},
    ),
    Layout("text", LANGUAGE_MODELING, {"text": ("text",)}),
)


@dataclass(frozen=True)
class Detection:
    """What the rows of a table are examples of.

    Attributes:
        task: 'classification', 'generation' or 'language-modeling'.
        layout: the name of one of ``LAYOUTS``.
        columns: the table's column for each field of the layout.
        reason: why, in words for the reader.
    """

    task: str
    layout: str
    columns: dict[str, str]
    reason: str

    def value(self, row: Row, name: str) -> Any:
        """Return the row's value of the field ``name``; None where the row or the layout has none."""
        column = self.columns.get(name)
        return None if column is None else row.fields.get(column)


def columns_named(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the columns that have one of ``names``; the first name alone, if a column has it."""
    best = [column for column in columns if column.strip().lower() == names[0]]
    return best or [column for column in columns if column.strip().lower() in names]


def label_text(value: object) -> str:
    """Return a label as the class name it stands for: ``3`` is '3', ``True`` is 'true'."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).strip()


def input_text(row: Row, detection: Detection) -> str:
    """Return all that the model is given of a row, as one text: what makes two examples the same."""
    if detection.layout == "messages":
        turns = []
        for message in row.fields[detection.columns["messages"]]:
            if message["role"] == "assistant":
                break
            turns.append(f"{message['role']}: {message['content']}")
        return "\n".join(turns)
    names = ("text", "text_pair", "prompt", "instruction", "input")
    given = (detection.value(row, name) for name in names)
    return "\n".join(str(value) for value in given if value)
