"""Prompts and completions as tokens, and that generation starts from the tokens that training had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ModelError
from lorakit.text.supervise import (
    instruction_message,
    instruction_prompt,
    prompt_completion_tokens,
    prompt_tokens,
    source_tokens,
    target_tokens,
)

PAIRS = [
    ("what is it?", "yes it is"),
    ("Answer: ", "yes"),
    ("Answer:\n", "yes"),
    ("Answer:", " yes"),
    ("Answer:  ", "\nyes"),
    ("日本", "語です"),
    ("what is i", "t"),
]


def parts(tokenizer: Any, ids: list[int], mask: list[bool]) -> tuple[str, str]:
    """Return the masked and the supervised text."""
    given = [token for token, kept in zip(ids, mask, strict=True) if not kept]
    learned = [token for token, kept in zip(ids, mask, strict=True) if kept]
    return tokenizer.decode(given), tokenizer.decode(learned)


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("what?", "yes", "what?\nyes"),
        ("what? ", "yes", "what? yes"),
        ("what?", " yes", "what? yes"),
        ("what?\n\n", "yes", "what?\n\nyes"),
    ],
)
def test_a_line_break_parts_them_only_where_no_white_space_does(
    bpe: Any, prompt: str, completion: str, text: str
) -> None:
    ids, _ = prompt_completion_tokens(bpe, prompt, completion)

    assert bpe.decode(ids) == f"{text}</s>"


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_completion_and_end_of_sequence_alone_are_supervised(bpe: Any, prompt: str, completion: str) -> None:
    given, learned = parts(bpe, *prompt_completion_tokens(bpe, prompt, completion))

    assert given.startswith(prompt)
    assert learned == f"{completion}</s>"


@pytest.mark.parametrize("style", ["plain", "chatml", "inst", "strips", "thinks-last", "thought-opened"])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_generation_starts_from_a_prefix_of_the_training_tokens(
    templated: Any, style: str, prompt: str, completion: str
) -> None:
    chat = style != "plain"
    tokenizer = templated(style if chat else "")
    separator = "" if completion[0].isspace() else "\n"

    start = prompt_tokens(tokenizer, prompt, chat, separator)
    ids, mask = prompt_completion_tokens(tokenizer, prompt, completion, chat)

    assert ids[: len(start)] == start
    assert mask.index(True) == len(start)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_prefix_holds_for_a_tokenizer_that_adds_a_space_and_bos(
    metaspace: Any, prompt: str, completion: str, chat: bool
) -> None:
    separator = "" if completion[0].isspace() else "\n"

    start = prompt_tokens(metaspace, prompt, chat, separator)
    ids, _ = prompt_completion_tokens(metaspace, prompt, completion, chat)

    assert start[0] == metaspace.bos_token_id
    assert ids[: len(start)] == start
    assert ids.count(metaspace.bos_token_id) == 1


def test_a_border_inside_a_token_adds_no_space(metaspace: Any) -> None:
    """Alone, the completion would be tokenised with a space before it, which the text has not."""
    ids, _ = prompt_completion_tokens(metaspace, "Answer: ", "yes")

    assert metaspace.decode(ids, skip_special_tokens=True) == "Answer: yes"


def test_whole_text_is_tokenised_as_one_where_the_border_allows(bpe: Any) -> None:
    ids, _ = prompt_completion_tokens(bpe, "what is it?", "yes it is")

    assert ids == [*bpe.encode("what is it?\nyes it is"), bpe.eos_token_id]


def test_end_of_sequence_is_not_doubled_where_the_data_has_it(bpe: Any) -> None:
    ids, mask = prompt_completion_tokens(bpe, "what?", "yes</s>")

    assert ids.count(bpe.eos_token_id) == 1
    assert mask[-1]


def test_a_tokenizer_without_end_of_sequence_is_refused(bpe: Any) -> None:
    bpe.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        prompt_completion_tokens(bpe, "what?", "yes")


def test_a_conversation_is_a_prompt_too(templated: Any) -> None:
    tokenizer = templated("chatml")
    asked = [{"role": "user", "content": "what?"}]

    assert prompt_tokens(tokenizer, asked, chat=True) == prompt_tokens(tokenizer, "what?", chat=True)


def test_instruction_without_input_has_no_input_part() -> None:
    assert instruction_prompt("Say no.") == "### Instruction:\nSay no.\n\n### Response:\n"
    assert instruction_prompt("Sum up.", " long ") == (
        "### Instruction:\nSum up.\n\n### Input:\nlong\n\n### Response:\n"
    )
    assert instruction_message("Sum up.", "long") == "Sum up.\n\nlong"


def test_encoder_decoder_targets_end_with_one_end_of_sequence(bpe: Any) -> None:
    assert target_tokens(bpe, ["yes", "no</s>"]) == [
        [*bpe.encode("yes"), bpe.eos_token_id],
        [*bpe.encode("no"), bpe.eos_token_id],
    ]
    assert source_tokens(bpe, ["what?"]) == [bpe.encode("what?")]


@pytest.mark.parametrize("chat", [False, True])
def test_the_prefix_holds_for_a_real_tokenizer_and_real_rows(shared: Path, chat: bool) -> None:
    from transformers import AutoTokenizer

    from lorakit.training.data.read import read_table

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-llama-en")
    rows = [row.fields for row in read_table(shared / "data" / "e2e" / "valid.jsonl").rows[::100]]

    starts = [prompt_tokens(tokenizer, row["prompt"], chat) for row in rows]
    wholes = [prompt_completion_tokens(tokenizer, row["prompt"], row["completion"], chat)[0] for row in rows]

    assert all(whole[: len(start)] == start for start, whole in zip(starts, wholes, strict=True))
