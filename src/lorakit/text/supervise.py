"""Prompts and completions as tokens: the one place that training and generation both go through.

Without chat a row is ``prompt + separator + completion + end of sequence``. The separator is a line break,
and is left out where the prompt ends or the completion begins with white space. With chat it is a user's
and an assistant's message. The ids of the prompt come first and are the ids that generation starts from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.text.chat import Messages, chat_passage, chat_prompt
from lorakit.text.tokens import Passage, encode_passages, end_of_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"


def prompt_completion_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, chat: bool = False
) -> tuple[list[int], list[bool]]:
    """Tokenise a prompt and its completion.

    Args:
        tokenizer: a fast tokenizer.
        prompt: what the model is given.
        completion: what it is to write.
        chat: write the two as messages (for chat and instruct models).

    Returns:
        The token ids, and for each whether it is supervised: the completion's and the end of sequence.
    """
    return encode_passages(tokenizer, [completion_passage(tokenizer, prompt, completion, chat)])[0]


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    chat: bool = False,
    separator: str = SEPARATOR,
) -> list[int]:
    """Tokenise what generation starts from: a prefix of what ``prompt_completion_tokens`` returns.

    Args:
        tokenizer: a fast tokenizer.
        prompt: the prompt, or with ``chat`` a whole conversation up to now.
        chat: as in training.
        separator: '' if the completions of training bring their own leading white space.
    """
    return encode_passages(tokenizer, [_prompt_passage(tokenizer, prompt, chat, separator)])[0][0]


def completion_passage(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, chat: bool = False) -> Passage:
    """Lay out a prompt and its completion, the completion as supervised characters."""
    if chat:
        passage = chat_passage(tokenizer, [*_asked(prompt), {"role": "assistant", "content": completion}])
        ((start, end),) = passage.spans
        return Passage(passage.text, ((start, end),), (start,), passage.special)
    before = _with_separator(prompt, separator_for(completion))
    text = before + completion
    return Passage(text, ((len(before), len(text)),), (len(before),), special=True, end=True)


def separator_for(completion: str) -> str:
    """Return what parts a prompt from this completion: nothing if it begins with white space itself."""
    return "" if completion[:1].isspace() else SEPARATOR


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Write an instruction, and what it is to be applied to, as a prompt for a model without chat."""
    parts = [f"### Instruction:\n{instruction.strip()}\n\n"]
    if given.strip():
        parts.append(f"### Input:\n{given.strip()}\n\n")
    return "".join([*parts, "### Response:\n"])


def instruction_message(instruction: str, given: str = "") -> str:
    """Write an instruction, and what it is to be applied to, as one message of a user."""
    return f"{instruction.strip()}\n\n{given.strip()}" if given.strip() else instruction.strip()


def source_text(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: bool = False) -> str:
    """Return what an encoder reads, to which its tokenizer adds its own special tokens."""
    return _prompt_passage(tokenizer, prompt, chat, separator="").text


def source_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise what an encoder reads, each text as a single sequence with its special tokens."""
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def target_tokens(tokenizer: PreTrainedTokenizerBase, completions: list[str]) -> list[list[int]]:
    """Tokenise what a decoder is to write: a single sequence, closed with the end of sequence."""
    end = end_of_sequence(tokenizer)
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in source_tokens(tokenizer, completions)]


def _prompt_passage(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: bool, separator: str) -> Passage:
    if chat or not isinstance(prompt, str):
        return chat_prompt(tokenizer, _asked(prompt) if isinstance(prompt, str) else prompt)
    return Passage(_with_separator(prompt, separator), special=True)


def _with_separator(prompt: str, separator: str) -> str:
    return prompt if prompt[-1:].isspace() else prompt + separator


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
