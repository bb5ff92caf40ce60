"""Rows as tokens and labels: what is masked, what is cut or left out, and that the notes say so."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakit.errors import DataError
from lorakit.text.supervise import instruction_prompt, prompt_tokens
from lorakit.training.data.detect import detect_task
from lorakit.training.data.encode import (
    EncodedSet,
    encode_classification,
    encode_generation,
    encode_language_modeling,
)
from lorakit.training.data.read import read_table, table_from_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def bpe() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that knows few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(word, special=True) for word in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["word word yes no"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.fixture
def wordpiece(minilm: Path) -> Any:
    """Return the real tokenizer of MiniLM."""
    return AutoTokenizer.from_pretrained(minilm)


def generation(tokenizer: Any, rows: list[dict[str, Any]], chat: bool = False, **settings: Any) -> EncodedSet:
    table = table_from_rows(rows)
    settings.setdefault("max_length", 64)
    return encode_generation(table, detect_task(table), tokenizer, chat=chat, **settings)


def learned(tokenizer: Any, encoded: EncodedSet) -> list[str]:
    return [tokenizer.decode([label for label in row.labels if label != -100]) for row in encoded.rows]


def classified(tokenizer: Any, rows: list[dict[str, Any]], labels: tuple[str, ...], max_length: int) -> EncodedSet:
    table = table_from_rows(rows)
    return encode_classification(table, detect_task(table), tokenizer, labels, max_length)


def test_classes_are_numbered_in_the_order_of_the_labels(wordpiece: Any) -> None:
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
    encoded = classified(wordpiece, rows, ("no", "yes"), 16)

    assert [(row.labels, row.expected, row.number, row.prompt) for row in encoded.rows] == [
        (1, "yes", 1, "good"),
        (0, "no", 2, "bad"),
    ]
    assert [row.input_ids for row in encoded.rows] == wordpiece(["good", "bad"])["input_ids"]
    assert encoded.notes == ()


def test_a_long_text_is_cut_and_noted(wordpiece: Any) -> None:
    rows = [{"text": "short", "label": 0}, {"text": "very " * 40, "label": 1}]
    encoded = classified(wordpiece, rows, ("0", "1"), 12)

    assert [len(row.input_ids) for row in encoded.rows] == [3, 12]
    assert encoded.rows[1].input_ids[-1] == wordpiece.sep_token_id
    assert encoded.notes == ("1 of 2 rows cut to 12 tokens (record 2).",)


def test_a_pair_of_texts_keeps_which_token_is_whose(wordpiece: Any) -> None:
    rows = [{"sentence1": "good", "sentence2": "bad day", "label": 0}]
    (row,) = classified(wordpiece, rows, ("0",), 16).rows

    assert row.input_ids == wordpiece("good", "bad day")["input_ids"]
    assert row.token_type_ids == [0, 0, 0, 1, 1, 1]
    assert row.prompt == "good\nbad day"


def test_a_label_outside_the_classes_is_refused_by_row(wordpiece: Any) -> None:
    rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}]

    with pytest.raises(DataError, match=r"record 2: label 'c'\. The classes are 'a', 'b'"):
        classified(wordpiece, rows, ("a", "b"), 16)


@pytest.mark.parametrize("chat", [False, True])
def test_labels_are_the_completion_and_its_end_at_their_own_places(bpe: Any, chat: bool) -> None:
    bpe.chat_template = CHATML
    encoded = generation(bpe, [{"prompt": "word", "completion": "yes"}], chat)

    (row,) = encoded.rows
    assert learned(bpe, encoded) == ["yes<|im_end|>" if chat else "yes</s>"]
    assert all(label in (-100, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    assert (row.prompt, row.expected) == ("word", "yes")


@pytest.mark.parametrize("chat", [False, True])
def test_the_rows_prompt_generates_from_the_rows_tokens(bpe: Any, chat: bool) -> None:
    bpe.chat_template = CHATML
    rows = [
        {"instruction": "Say yes.", "input": "now", "output": "yes"},
        {"instruction": "Say no.", "input": "", "output": "no"},
    ]
    encoded = generation(bpe, rows, chat, max_length=200)

    for row in encoded.rows:
        start = prompt_tokens(bpe, row.prompt, chat, encoded.separator)
        assert row.input_ids[: len(start)] == start
        assert [label == -100 for label in row.labels].index(False) == len(start)


def test_an_instruction_is_laid_out_for_models_without_chat(bpe: Any) -> None:
    encoded = generation(bpe, [{"instruction": "Say yes.", "output": "yes"}], max_length=200)

    assert bpe.decode(encoded.rows[0].input_ids) == instruction_prompt("Say yes.") + "yes</s>"


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (None, "</s>")])
def test_conversations_are_rendered_whether_the_model_is_for_chat_or_not(
    bpe: Any, template: str | None, end: str
) -> None:
    bpe.chat_template = template
    turns = [("user", "word"), ("assistant", "yes"), ("user", "word"), ("assistant", "no")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    encoded = generation(bpe, [row], max_length=200)

    assert learned(bpe, encoded) == [f"yes{end}no{end}"]
    assert (encoded.rows[0].prompt, encoded.rows[0].expected) == ("word", "yes")


def test_a_conversation_that_the_template_refuses_is_named_by_row(bpe: Any) -> None:
    bpe.chat_template = "{{ raise_exception('never') if messages[0].content == 'bad' }}" + CHATML
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
        for content in ("good", "bad", "bad")
    ]

    with pytest.raises(DataError, match=r"(?s)2 rows.*record 2: .*never.*record 3: .*never"):
        generation(bpe, rows)


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    said = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, contents, strict=False)]
    return [{"role": "system", "content": system}, *said] if system is not None else said


def test_rows_that_teach_nothing_are_skipped_and_noted(bpe: Any) -> None:
    rows = [{"prompt": "word", "completion": text} for text in ("yes", "", "no", None)]
    encoded = generation(bpe, rows)

    assert [row.number for row in encoded.rows] == [1, 3]
    assert encoded.notes == ("2 of 4 rows skipped: 'completion' is empty (records 2, 4).",)


def test_rows_without_a_label_are_skipped_and_noted(wordpiece: Any) -> None:
    encoded = classified(wordpiece, [{"text": "x", "label": label} for label in (1, None, 0)], ("0", "1"), 8)

    assert [row.number for row in encoded.rows] == [1, 3]
    assert encoded.notes == ("1 of 3 rows skipped: 'label' is empty (record 2).",)


def test_few_rows_that_the_template_refuses_are_skipped_with_its_reason(bpe: Any) -> None:
    bpe.chat_template = "{{ raise_exception('never') if messages[0].content == 'bad' }}" + CHATML
    encoded = generation(bpe, [{"messages": turns(content, "yes")} for content in ("good", "bad", "fine")])

    assert [row.number for row in encoded.rows] == [1, 3]
    assert encoded.notes[0].startswith("1 of 3 rows skipped: the model's chat template refuses messages 1 to 2: never")


def test_answers_that_the_template_rewrites_are_parts_of_their_own_and_noted(bpe: Any) -> None:
    bpe.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ '<think></think>' if loop.last and loop.index0 % 2 }}{{ m.content }}"
    )
    encoded = generation(
        bpe, [{"messages": turns("word", "yes", "word", "no")}, {"messages": turns("word", "no")}], max_length=200
    )

    assert learned(bpe, encoded) == [f"<think></think>{word}<|im_end|>" for word in ("yes", "no", "no")]
    assert [row.number for row in encoded.rows] == [1, 1, 2]
    assert "1 rows are learned in 2 parts" in encoded.notes[0]


def test_a_system_message_that_has_no_place_is_noted(bpe: Any) -> None:
    bpe.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
    encoded = generation(bpe, [{"messages": turns("word", "yes", system="be kind")}, {"messages": turns("word", "no")}])

    assert "be kind\n\nword" in bpe.decode(encoded.rows[0].input_ids)
    assert encoded.notes[0].startswith("in 1 rows the system message is put before the user's first message")


def test_a_template_that_never_ends_a_turn_is_noted(bpe: Any) -> None:
    bpe.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    assert (
        "nothing behind an answer: the model cannot learn to stop"
        in generation(bpe, [{"messages": turns("a", "b")}]).notes[0]
    )


SHAREGPT = [
    {"from": "human", "value": "word"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "yes"},
]


def test_sharegpt_with_tools_and_a_system_column_is_learned(bpe: Any) -> None:
    row = {"conversations": SHAREGPT, "system": "be kind", "tools": '[{"name": "f", "parameters": {}}]'}
    encoded = generation(bpe, [row], max_length=400)

    assert learned(bpe, encoded) == ['{"name": "f", "arguments": {"x": 1}}</s>yes</s>']
    text = bpe.decode(encoded.rows[0].input_ids)
    assert text.startswith('### Tools:\n{"name": "f", "parameters": {}}\n\n### System:\nbe kind\n\n### User:\nword')
    assert (encoded.rows[0].prompt, encoded.rows[0].expected) == ("word", "(calls f)")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"instruction": "word", "input": "no", "output": "yes", "history": [["a", "b"]], "system": "be kind"},
            "b</s>yes</s>",
        ),
        ({"prompt": turns("a", "b", "c"), "completion": turns("", "yes")[1:]}, "yes</s>"),
        ({"prompt": "a", "completion": "yes", "system": "be kind"}, "yes</s>"),
        (
            {"messages": [*turns("a")[:1], {"role": "assistant", "content": "b", "weight": 0}, *turns("c", "d")]},
            "d</s>",
        ),
        ({"messages": json.dumps(turns("a", "b"))}, "b</s>"),
    ],
    ids=["alpaca with history", "prompt of messages", "prompt with system", "weight", "JSON text"],
)
def test_conversations_of_every_shape_learn_their_answers(bpe: Any, row: dict[str, Any], words: str) -> None:
    encoded = generation(bpe, [row], max_length=400)

    assert learned(bpe, encoded) == [words]
    assert ("be kind" in bpe.decode(encoded.rows[0].input_ids)) == ("system" in row)


def test_progress_is_told_up_to_the_last_row(bpe: Any) -> None:
    table = table_from_rows([{"prompt": "word", "completion": "yes"}] * 1200)
    told: list[tuple[int, int]] = []
    encode_generation(
        table, detect_task(table), bpe, 64, False, progress=lambda done, total: told.append((done, total))
    )

    assert told == [(512, 1200), (1024, 1200), (1200, 1200), (1200, 1200)]


def test_blocks_over_many_rows_are_those_of_one_text(bpe: Any) -> None:
    """Rows come in chunks of 512; a block may begin in one and end in another."""
    texts = ["yes " * (1 + number % 7) for number in range(1100)]
    table = table_from_rows([{"text": text} for text in texts])
    encoded = encode_language_modeling(table, detect_task(table), bpe, max_length=50)

    joined = [token for text in texts for token in [*bpe.encode(text), bpe.eos_token_id]]
    assert [token for row in encoded.rows for token in row.input_ids] == joined
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(bpe.encode(text)) + 1)
    owners = [
        max(i for i, start in enumerate(starts[:-1]) if start <= 50 * block) for block in range(len(encoded.rows))
    ]
    assert [row.number for row in encoded.rows] == [owner + 1 for owner in owners]
    assert [row.expected for row in encoded.rows] == [texts[owner] for owner in owners]


def test_rows_that_are_too_long_are_left_out_and_noted_by_kind(bpe: Any) -> None:
    rows = [
        {"prompt": "word", "completion": "yes"},
        {"prompt": "word", "completion": "yes " * 60},
        {"prompt": "word " * 60, "completion": "yes"},
        {"prompt": "word", "completion": "no"},
    ]
    encoded = generation(bpe, rows, max_length=32)

    assert [row.number for row in encoded.rows] == [1, 4]
    assert encoded.notes == (
        "1 of 4 rows left out: longer than 32 tokens (record 2).",
        "1 of 4 rows left out: the prompt alone fills the 32 tokens (record 3).",
    )


def test_a_row_as_long_as_the_limit_is_kept(bpe: Any) -> None:
    row = {"prompt": "word", "completion": "yes"}
    (length,) = [len(encoded.input_ids) for encoded in generation(bpe, [row]).rows]

    assert len(generation(bpe, [row], max_length=length).rows) == 1


def test_no_row_left_is_refused_by_row(bpe: Any) -> None:
    rows = [{"prompt": "word", "completion": "yes " * 60}] * 2

    with pytest.raises(DataError, match=r"no row is left\. 2 of 2 rows left out: .*\(records 1, 2\)"):
        generation(bpe, rows, max_length=16)


def test_rows_whose_labels_are_all_masked_are_refused_by_row(bpe: Any) -> None:
    """Some tokenizers drop invisible characters, and some templates have no mark for the end of a turn."""
    bpe.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    bpe.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    rows = [{"prompt": "word", "completion": completion} for completion in ("yes", "\u200b", "\u200b\u200b")]

    with pytest.raises(
        DataError, match=r"(?s)2 rows cannot be used.*record 2: nothing to learn from.*record 3: nothing"
    ):
        generation(bpe, rows, chat=True)


@pytest.mark.parametrize(
    ("completions", "separator"), [(["yes", "no"], "\n"), ([" yes", "\nno"], ""), ([" yes", "no"], "\n")]
)
def test_the_separator_for_generation_follows_the_completions(bpe: Any, completions: list[str], separator: str) -> None:
    rows = [{"prompt": "word", "completion": completion} for completion in completions]

    assert generation(bpe, rows).separator == separator


def test_encoder_decoder_rows_have_the_prompt_as_input_and_the_completion_as_labels(bpe: Any) -> None:
    encoded = generation(bpe, [{"prompt": "word", "completion": "yes no"}], encoder_decoder=True)

    assert encoded.rows[0].input_ids == bpe.encode("word")
    assert encoded.rows[0].labels == [*bpe.encode("yes no"), bpe.eos_token_id]


def test_encoder_decoder_conversations_learn_the_last_answer(bpe: Any) -> None:
    turns = [("user", "word"), ("assistant", "yes"), ("user", "word"), ("assistant", "no")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    encoded = generation(bpe, [row], encoder_decoder=True, max_length=200)

    assert learned(bpe, encoded) == ["no</s>"]
    assert bpe.decode(encoded.rows[0].input_ids).endswith("### User:\nword\n\n### Assistant:\n")


def test_texts_are_joined_by_end_of_sequence_and_cut_in_blocks(bpe: Any) -> None:
    texts = ["word word yes", "no", "yes no word"]
    table = table_from_rows([{"text": text} for text in texts])
    encoded = encode_language_modeling(table, detect_task(table), bpe, max_length=4)

    joined = [token for text in texts for token in [*bpe.encode(text), bpe.eos_token_id]]
    assert [token for row in encoded.rows for token in row.input_ids] == joined
    assert [len(row.input_ids) for row in encoded.rows[:-1]] == [4] * (len(encoded.rows) - 1)
    assert all(row.labels == row.input_ids for row in encoded.rows)
    assert encoded.rows[0].number == 1


def test_a_last_block_with_nothing_to_predict_is_left_off(bpe: Any) -> None:
    table = table_from_rows([{"text": "yes yes yes"}])
    count = len(bpe.encode("yes yes yes"))
    encoded = encode_language_modeling(table, detect_task(table), bpe, max_length=count)

    assert [len(row.input_ids) for row in encoded.rows] == [count]


def test_ten_thousand_rows_are_encoded_in_seconds(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", "off")
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-llama-en")
    rows = [row.fields for row in read_table(shared / "data" / "e2e" / "valid.jsonl").rows]
    table = table_from_rows([*rows, *rows, *rows][:10_000])
    detection = detect_task(table)

    start = time.perf_counter()
    encoded = encode_generation(table, detection, tokenizer, 512, chat=False)

    assert len(encoded.rows) == 10_000
    assert time.perf_counter() - start < 20  # some 2 s alone; a row at a time takes minutes


def test_real_rows_learn_exactly_their_completions(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-llama-en")
    table = read_table(shared / "data" / "instruct" / "alpaca_en.json")
    encoded = encode_generation(table, detect_task(table), tokenizer, 512, chat=False)

    assert learned(tokenizer, encoded) == [f"{row.expected}</s>" for row in encoded.rows]
    assert len(encoded.rows) + int(encoded.notes[0].split()[0]) == 999


TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_of_a_file_are_told_and_calls_of_them_learned(bpe: Any, tmp_path: Path) -> None:
    bpe.chat_template = TOOLS_TEMPLATE
    # As OpenAI's API has them: arguments are JSON in a text, an answer that only calls has no content.
    call = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "yes?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "word"},
            {"role": "assistant", "content": "no"},
        ],
        "tools": [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}],
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    table = read_table(str(file))
    (found,) = encode_generation(table, detect_task(table), bpe, max_length=512, chat=True).rows
    learned = bpe.decode([label for label in found.labels if label != -100])
    text = bpe.decode(found.input_ids)
    assert '<tools>[{"type": "function", "function": {"name": "rain", "parameters"' in text
    assert "<|im_start|>tool\nword<|im_end|>" in text
    assert learned == '<call>{"name": "rain", "arguments": {"city": "Oslo"}}</call><|im_end|>no<|im_end|>'
