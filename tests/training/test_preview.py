"""The preview shows the tokens of training, counts them, and says what is odd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.training.data.encode import EncodedRow
from lorakit.training.data.pieces import pieces_of
from lorakit.training.preview import Preview, preview

Bases = Callable[[str], Path]

QUESTIONS = [{"prompt": f"the {word}", "completion": f"{word} red"} for word in ("house", "boat", "tree", "car") * 3]


def opinions(**counts: int) -> list[dict[str, str]]:
    return [{"text": f"{label} {n} sky", "label": label} for label, count in counts.items() for n in range(count)]


def shown(found: Preview) -> list[list[tuple[str, str]]]:
    return [[(piece.text.strip(), piece.kind) for piece in row.pieces] for row in found.rows]


def test_pieces_are_the_tokens_and_what_is_learned_of_them(bases: Bases) -> None:
    rows = [{"prompt": f"the {word}", "completion": "red"} for word in ("boat", "car", "sky", "tree")]
    found = preview(bases("gpt2"), rows, num_shown=1)

    word = rows[found.rows[0].number - 1]["prompt"].removeprefix("the ")
    assert shown(found) == [
        [("the", "masked"), (word, "masked"), ("red", "supervised"), ("</s>", "supervised")],
    ]
    assert [piece.special for piece in found.rows[0].pieces] == [False, False, False, True]


def test_a_chat_models_rows_are_shown_in_its_template(bases: Bases) -> None:
    found = preview(bases("llama-chat"), QUESTIONS, num_shown=1)

    assert found.chat
    assert [text for text, kind in shown(found)[0] if kind == "supervised"] == ["house", "red", "</s>"]


def test_counts_are_those_of_all_rows(bases: Bases) -> None:
    found = preview(bases("gpt2"), QUESTIONS, validation=0.25)

    assert found.num_rows == (9, 3)
    assert (found.num_supervised, found.num_masked, found.num_cut) == (27, 18, 0)
    assert (found.lengths.median, found.lengths.longest, sum(found.lengths.counts)) == (5, 5, 9)


def test_a_row_that_is_left_out_is_shown_as_cut(bases: Bases) -> None:
    rows = [*QUESTIONS, *({"prompt": f"the {word} car", "completion": "red " * 20} for word in ("old", "new", "very"))]
    found = preview(bases("gpt2"), rows, num_shown=20, max_length=12)

    left = [row for row in found.rows if row.left_out]
    assert left
    assert all(row.number > len(QUESTIONS) for row in left)
    assert {piece.kind for row in left for piece in row.pieces} == {"cut"}
    assert found.lengths.num_over == len(left)
    assert found.num_cut == sum(len(piece.ids) for row in left for piece in row.pieces)


def test_a_classifiers_text_is_shown_as_it_is_cut(bases: Bases) -> None:
    rows = [{"text": f"the old {'house ' * 4}is very new", "label": label} for label in ("a", "b")]
    found = preview(bases("bert"), rows + opinions(a=4, b=4), num_shown=1, max_length=8)

    assert shown(found)[0] == [
        ("<cls>", "masked"),
        ("the", "masked"),
        ("old", "masked"),
        *[("house", "masked")] * 4,
        ("<sep>", "masked"),
        ("is", "cut"),
        ("very", "cut"),
        ("new", "cut"),
    ]
    assert (found.rows[0].target, found.rows[0].num_cut) == ("a", 3)


def test_an_encoder_decoders_two_sides_are_shown(bases: Bases) -> None:
    found = preview(bases("t5"), QUESTIONS, num_shown=1)

    assert [kind for _, kind in shown(found)[0]] == ["masked"] * 3 + ["supervised"] * 3


def test_texts_are_learned_whole(bases: Bases) -> None:
    found = preview(bases("gpt2"), [{"text": f"the house is {'red ' * n}"} for n in range(1, 9)], num_shown=1)

    assert {kind for _, kind in shown(found)[0]} == {"supervised"}
    assert found.num_masked == 0


def test_rows_are_shown_from_the_first_to_the_last(bases: Bases) -> None:
    rows = [{"text": f"the sky {'a ' * n}", "label": "ab"[n % 2]} for n in range(20)]
    numbers = [row.number for row in preview(bases("bert"), rows, num_shown=3).rows]

    assert (numbers[0] <= 2, 8 <= numbers[1] <= 13, numbers[2] >= 19) == (True, True, True)


ODD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "copies": (QUESTIONS[:4] * 3, "rows are copies of earlier ones"),
    "another label": (
        [*opinions(a=9, b=9), {"text": "a 1 sky", "label": "b"}, {"text": "A 1  sky", "label": "a"}],
        "have the text of an earlier row and another label",
    ),
    "rare": (opinions(a=20, b=20, c=3), "classes with fewer than 8 rows: 'c (3)'"),
    "unbalanced": (opinions(a=200, b=10), "classes are unbalanced: 'a' has 180 rows, 'b' 9"),
    "short": (
        [{"prompt": f"the {word}", "completion": "#"} for word in ("house", "boat", "tree", "car", "sky")],
        "rows have an answer of one character",
    ),
}


@pytest.mark.parametrize(("rows", "warning"), ODD.values(), ids=ODD.keys())
def test_what_is_odd_is_said(bases: Bases, rows: list[dict[str, Any]], warning: str) -> None:
    found = preview(bases("bert" if "label" in rows[0] else "gpt2"), rows)

    assert [text for text in found.warnings if warning in text]


def test_sound_rows_have_no_warnings(bases: Bases) -> None:
    words = ("house", "boat", "tree", "car", "sky", "old", "new", "very")
    rows = [{"prompt": f"the {one} {two}", "completion": f"{two} red"} for one in words for two in words]

    assert preview(bases("gpt2"), rows).warnings == ()


def test_rows_on_both_sides_are_said(bases: Bases, tmp_path: Path) -> None:
    for split, rows in (("train", opinions(a=9, b=9)), ("validation", opinions(a=2, b=1))):
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    found = preview(bases("bert"), tmp_path)

    assert [text for text in found.warnings if "3 validation rows have the input of a training row" in text]


def test_an_answer_whose_end_is_not_learned_is_said(bases: Bases, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    endless.mkdir()
    for file in bases("llama-chat").iterdir():
        (endless / file.name).write_bytes(file.read_bytes())
    (endless / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} : {{ m.content }} \n{% endfor %}")
    found = preview(endless, QUESTIONS)

    assert [text for text in found.warnings if "no token that ends an answer is learned" in text]
    assert [text for text in found.notes if "cannot learn to stop" in text]


def test_columns_may_be_named(bases: Bases) -> None:
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in QUESTIONS]
    found = preview(bases("gpt2"), rows, columns={"prompt": "q", "completion": "a"})

    assert found.found == "prompts with completions in 'q', 'a', 12 rows"


@pytest.mark.parametrize(
    ("kind", "rows", "settings", "error", "message"),
    [
        ("bert", QUESTIONS, {}, ModelError, "is an encoder"),
        ("gpt2", QUESTIONS, {"max_length": 65}, ConfigError, "above the model's context of 64"),
        ("gpt2", [{"prompt": "a", "completion": ""}] * 4, {}, DataError, "4 of 4 rows have nothing to learn from"),
        (
            "gpt2",
            [{"prompt": f"the {word} {'is ' * 20}", "completion": "a"} for word in ("house", "boat", "tree", "car")],
            {"max_length": 8},
            DataError,
            "no row is left",
        ),
        ("gpt2", [{"a": 1}] * 4, {}, DataError, "fit no task"),
    ],
)
def test_what_training_refuses_is_refused(
    bases: Bases, kind: str, rows: list[dict[str, Any]], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preview(bases(kind), rows, **settings)


def test_no_weights_are_read(bases: Bases, tmp_path: Path) -> None:
    for file in bases("gpt2").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    header = (bases("gpt2") / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(header[:8], "little")
    with (tmp_path / "model.safetensors").open("wb") as sparse:
        sparse.write(header[:size])
        sparse.truncate(len(header))  # zeros for weights: reading them would not fail, but they are no model

    assert preview(tmp_path, QUESTIONS).num_supervised == preview(bases("gpt2"), QUESTIONS).num_supervised


@pytest.mark.parametrize(
    ("rows", "labels"),
    [(["naïve ☕ 日本 🙂"], 0), (["ä", "</s>", "b  c\n\nd"], 0)],
)
def test_pieces_together_are_the_text(shared: Path, rows: list[str], labels: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-llama-en")
    ids = tokenizer("".join(rows), add_special_tokens=False).input_ids
    row = EncodedRow(ids, labels, 1, "", "")
    pieces = pieces_of(tokenizer, row, row)

    assert "".join(piece.text for piece in pieces) == "".join(rows)
    assert [number for piece in pieces for number in piece.ids] == ids
    assert all("\ufffd" not in piece.text for piece in pieces)


@pytest.mark.parametrize("data", ["instruct/alpaca_en.json", "e2e/valid.jsonl"])
def test_real_rows_are_previewed(shared: Path, data: str) -> None:
    found = preview(shared / "models" / "tiny-llama-en", shared / "data" / data, max_length=256)

    assert found.num_supervised > found.num_counted
    assert sum(found.lengths.counts) == found.num_counted


def test_the_packaged_model_is_previewed(minilm: Path) -> None:
    found = preview(minilm, opinions(good=9, bad=9), num_shown=1)

    assert found.rows[0].pieces[0].text == "[CLS]"
    assert found.context == 512
