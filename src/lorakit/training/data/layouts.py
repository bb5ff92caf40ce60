"""The column layouts that lorakit understands, and how a row's fields are read once one is chosen.

    task               layout              fields
    classification     pair-label          text + text_pair + label
    classification     text-label          text + label
    generation         messages            messages, with system and tools beside them; or an instruction or a prompt
                                           with a history of turns or a system message beside it
    generation         instruction-output  instruction + output, input may be empty
    generation         prompt-completion   prompt + completion
    language-modeling  text                text

Each field has the column names that common sets of examples use; they are compared without regard to case.
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

MESSAGES = "messages"

TEXT_NAMES = ("text", "sentence", "content", "message", "question", "review", "utterance", "tweet")
LABEL_NAMES = ("label", "labels", "intent", "category", "class")
ANSWER_NAMES = ("output", "response", "answer", "completion", "target")
SYSTEM_NAMES = ("system", "system_prompt")


@dataclass(frozen=True)
class Layout:
    """Fields that make up an example of ``task``, each with the column names it may have, best first.

    Attributes:
        name: as stored in a run's ``task.json``.
        task: what is learned.
        words: what a reader calls such rows.
        needed: fields without which it is not this layout.
        optional: fields that it may have.
        telling: of the optional ones, those of which some row must have one: else it is a plainer layout.
    """

    name: str
    task: str
    words: str
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    telling: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the needed columns for a message: ``'text' + 'label' (or 'labels', 'intent')``."""
        parts = []
        for name, names in self.needed.items():
            others = [other for other in names if other != name]
            parts.append(f"'{name}'" + (f" (or {quoted(others)})" if others else ""))
        parts += [f"'{name}'" for name in self.telling[:1]]
        return " + ".join(parts)


_INSTRUCTION = {"instruction": ("instruction",), "output": ANSWER_NAMES}
_INPUT = {"input": ("input", "context")}
_TURNS = {"history": ("history",), "system": SYSTEM_NAMES}
# Names that go together: a column 'source' beside 'question' and 'answer' says where they are from.
_PAIRS = (
    ("prompt", ("completion", "response", "answer", "output", "target")),
    ("question", ("answer", "response", "output", "completion")),
    ("query", ("response", "answer", "output", "completion")),
    ("input", ("output", "target", "response", "completion")),
    ("source", ("target",)),
)

LAYOUTS = (
    Layout(
        "pair-label",
        CLASSIFICATION,
        "pairs of texts with a label",
        {
            "text": ("text", "sentence1", "premise", "question1"),
            "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
            "label": LABEL_NAMES,
        },
    ),
    Layout("text-label", CLASSIFICATION, "texts with a label", {"text": TEXT_NAMES, "label": LABEL_NAMES}),
    Layout(
        MESSAGES,
        GENERATION,
        "chat messages",
        {"messages": ("messages", "conversations", "conversation", "dialog", "chat")},
        {"system": SYSTEM_NAMES, "tools": ("tools",)},
    ),
    Layout(
        MESSAGES,
        GENERATION,
        "instructions with turns before them",
        _INSTRUCTION,
        {**_INPUT, **_TURNS},
        telling=("history", "system"),
    ),
    Layout("instruction-output", GENERATION, "instructions with outputs", _INSTRUCTION, _INPUT),
    Layout(
        "instruction-output",
        GENERATION,
        "questions about a context",
        {"instruction": ("question", "query"), "input": ("context", "passage"), "output": ANSWER_NAMES},
    ),
    *(
        Layout(
            MESSAGES,
            GENERATION,
            "prompts with turns before them",
            {"prompt": (prompt,), "completion": completions},
            _TURNS,
            telling=("history", "system"),
        )
        for prompt, completions in _PAIRS
    ),
    *(
        Layout(
            "prompt-completion",
            GENERATION,
            "prompts with completions",
            {"prompt": (prompt,), "completion": completions},
        )
        for prompt, completions in _PAIRS
    ),
    Layout("text", LANGUAGE_MODELING, "texts", {"text": ("text",)}),
)

FIELDS = tuple(dict.fromkeys(name for layout in LAYOUTS for name in {**layout.needed, **layout.optional}))


@dataclass(frozen=True)
class Detection:
    """What the rows of a table are examples of.

    Attributes:
        task: 'classification', 'generation' or 'language-modeling'.
        layout: the name of one of ``LAYOUTS``.
        columns: the table's column for each field of the layout.
        reason: what was found, in words for the reader.
        skipped: rows that teach nothing and are left out, each with why.
    """

    task: str
    layout: str
    columns: dict[str, str]
    reason: str
    skipped: tuple[tuple[int, str], ...] = ()

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
