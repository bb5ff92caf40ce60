"""Encoded rows on disk: the same rows as in memory, made once, made again when anything they hang on changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorakit.training.data.cache import LEAST_ROWS, Entry, MappedRows, cache_folder, content_key
from lorakit.training.data.detect import detect_task
from lorakit.training.data.encode import (
    EncodedRow,
    EncodedSet,
    encode_classification,
    encode_generation,
    encode_language_modeling,
)
from lorakit.training.data.read import table_from_rows
from lorakit.training.data.table import Table

WORDS = ["<unk>", "</s>", *(str(number) for number in range(100))]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: numbers."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that rows are cached in, empty as yet."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def questions(count: int = LEAST_ROWS) -> Table:
    return table_from_rows(
        [{"prompt": f"{i % 100} {i // 100}", "completion": " ".join(["7"] * (i % 5 + 1))} for i in range(count)]
    )


def generation(tokenizer: Any, table: Table, max_length: int = 8) -> EncodedSet:
    return encode_generation(table, detect_task(table), tokenizer, max_length, chat=False)


def classification(tokenizer: Any, table: Table, max_length: int = 8) -> EncodedSet:
    rows = [{"text": row.fields["prompt"], "text_pair": "5", "label": row.number % 3} for row in table.rows]
    pairs = table_from_rows(rows)
    return encode_classification(pairs, detect_task(pairs), tokenizer, ["0", "1", "2"], max_length)


def language_modeling(tokenizer: Any, table: Table, max_length: int = 3) -> EncodedSet:
    texts = table_from_rows([{"text": row.fields["prompt"]} for row in table.rows])
    return encode_language_modeling(texts, detect_task(texts), tokenizer, max_length)


@pytest.mark.parametrize("encode", [generation, classification, language_modeling])
def test_cached_rows_are_those_in_memory(
    words: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, encode: Callable[..., EncodedSet]
) -> None:
    table = questions()
    first, second = encode(words, table), encode(words, table)
    monkeypatch.setenv("LORAKIT_CACHE", "off")
    plain = encode(words, table)

    assert isinstance(second.rows, MappedRows)
    assert isinstance(plain.rows, tuple)
    assert tuple(first.rows) == tuple(second.rows) == plain.rows
    assert first.notes == second.notes == plain.notes
    assert first.separator == second.separator == plain.separator


def test_the_second_time_nothing_is_tokenised(words: Any, folder: Path) -> None:
    table = questions()
    told: list[tuple[int, int]] = []
    detection = detect_task(table)
    encode_generation(table, detection, words, 8, chat=False, progress=lambda done, total: told.append((done, total)))
    steps = len(told)
    encode_generation(table, detection, words, 8, chat=False, progress=lambda done, total: told.append((done, total)))

    assert steps > 10
    assert told[-1] == told[steps - 1] == (LEAST_ROWS, LEAST_ROWS)
    assert len(told) == steps + 1


def test_few_rows_are_not_cached(words: Any, folder: Path) -> None:
    assert isinstance(generation(words, questions(LEAST_ROWS - 1)).rows, tuple)
    assert not folder.exists()


@pytest.fixture
def entry(folder: Path) -> Entry:
    """Return an entry with three rows."""
    made = Entry(folder, "key")
    made.write(iter(ROWS), lambda: {"notes": ["n"], "separator": "\n"})
    return made


ROWS = (
    EncodedRow([1, 2, 3], [-100, 2, 3], 4, "a", "b"),
    EncodedRow([5], 2, 7, "é", "x", [1]),
    EncodedRow([], [9, 9], 2**40, "", ""),
)


def test_every_kind_of_row_comes_back(entry: Entry) -> None:
    found = entry.read()

    assert found is not None
    rows, facts = found
    assert tuple(rows) == ROWS
    assert (rows[-1], rows[:2]) == (ROWS[-1], ROWS[:2])
    assert (facts["notes"], facts["separator"]) == (["n"], "\n")


def test_lengths_are_known_without_the_rows(entry: Entry) -> None:
    assert MappedRows(entry.rows_file).lengths() == [3, 1, 0]


@pytest.mark.parametrize("place", [3, -4])
def test_a_row_that_is_not_there_is_an_index_error(entry: Entry, place: int) -> None:
    with pytest.raises(IndexError):
        MappedRows(entry.rows_file)[place]


def flip(entry: Entry) -> None:
    data = bytearray(entry.rows_file.read_bytes())
    data[len(data) // 2] ^= 1
    entry.rows_file.write_bytes(data)


BROKEN: dict[str, Callable[[Entry], object]] = {
    "a bit": flip,
    "cut": lambda entry: entry.rows_file.write_bytes(entry.rows_file.read_bytes()[:-40]),
    "gone": lambda entry: entry.rows_file.unlink(),
    "facts": lambda entry: entry.facts_file.write_text("{"),
    "no facts": lambda entry: entry.facts_file.write_text("[]"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_entry_is_no_entry_and_is_said(
    entry: Entry, damage: Callable[[Entry], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(entry)

    assert entry.read() is None
    assert "broken and are made again" in caplog.text


def test_a_broken_entry_is_made_again(words: Any, folder: Path) -> None:
    table = questions()
    before = generation(words, table)
    (file,) = folder.glob("*.arrow")
    rows = tuple(before.rows)
    flip(Entry(folder, file.stem))

    assert tuple(generation(words, table).rows) == rows
    assert Entry(folder, file.stem).read() is not None


def test_what_fails_leaves_no_entry(words: Any, folder: Path) -> None:
    def rows() -> Any:
        yield ROWS[0]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        Entry(folder, "key").write(rows(), dict)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_and_rows_stay_in_memory(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "lorakit"):
        found = generation(words, questions())

    assert len(found.rows) == LEAST_ROWS
    assert "could not be kept" in caplog.text


def key(tokenizer: Any, table: Table, **settings: Any) -> str:
    return content_key(table, tokenizer, {"max_length": 8, **settings})


def test_the_key_is_of_the_content_alone(words: Any) -> None:
    table = questions(20)
    again = Table("elsewhere.jsonl", tuple(table.rows), table.unit)

    assert key(words, table) == key(words, again)


def test_the_key_changes_with_a_row(words: Any) -> None:
    table, other = questions(20), questions(20)
    other.rows[7].fields["completion"] += " 7"

    assert key(words, table) != key(words, other)


def test_the_key_changes_with_the_choice_of_rows(words: Any) -> None:
    table = questions(20)

    assert key(words, table.chosen(range(10))) != key(words, table.chosen(range(1, 11)))


def test_the_key_changes_with_a_setting(words: Any) -> None:
    assert key(words, questions(20)) != key(words, questions(20), max_length=9)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "eos_token", "7"),
        lambda tokenizer: tokenizer.add_tokens([AddedToken("<new>")]),
    ],
    ids=["template", "end", "vocabulary"],
)
def test_the_key_changes_with_the_tokenizer(words: Any, change: Callable[[Any], object]) -> None:
    table = questions(20)
    before = key(words, table)
    change(words)

    assert key(words, table) != before


@pytest.mark.parametrize("value", ["", "0", "off", "none"])
def test_the_cache_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", value)

    assert cache_folder() is None


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORAKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert cache_folder() == tmp_path / "lorakit" / "rows"


def test_an_entry_says_how_many_rows_it_has(words: Any, folder: Path) -> None:
    generation(words, questions())
    (facts,) = folder.glob("*.json")

    assert json.loads(facts.read_text())["count"] == LEAST_ROWS
