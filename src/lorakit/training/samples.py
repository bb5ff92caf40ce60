"""A few held-out rows answered, before and after: predictions of a classifier, continuations of a writer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.records import Sample
from lorakit.text.generate import evaluating, generate
from lorakit.text.supervise import prompt_tokens, source_text, source_tokens
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.objectives import bounded_batches, forward
from lorakit.training.spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SHOWN = 6
NUM_WRITTEN = 3
NEW_TOKENS = 48
PROMPT_TOKENS = 16

Answers = list[str]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]
) -> Answers:
    """Answer rows, chosen by :func:`questions`, with the model as it is now."""
    if spec.labels:
        shares = probabilities(model, rows, spec.collator(tokenizer))
        best = shares.max(-1)
        return [f"{spec.labels[int(i)]} ({float(p):.2f})" for p, i in zip(best.values, best.indices, strict=True)]
    prompts = [row.prompt for row in rows]
    return generate(model, tokenizer, prompts, _room(spec), chat=spec.chat, separator=spec.separator)


def paired(before: Answers, after: Answers, rows: Sequence[EncodedRow], spec: TaskSpec) -> tuple[Sample, ...]:
    """Put answers to the same rows from before and after side by side.

    Of a classifier's the first are one of each class, which turned right if there is one, and the last one is
    wrong still if there is one.
    """
    found = [Sample(row.prompt, row.expected, b, a) for row, b, a in zip(rows, before, after, strict=True)]
    if not spec.labels:
        return tuple(found)
    turned = sorted(found, key=lambda s: not (_right(s.after, s) and not _right(s.before, s)))
    firsts: dict[str, Sample] = {}
    for sample in turned:
        firsts.setdefault(sample.expected, sample)
    shown = [*firsts.values(), *(sample for sample in turned if sample not in firsts.values())]
    wrong = [sample for sample in found if not _right(sample.after, sample) and sample not in shown[: NUM_SHOWN - 1]]
    return tuple([*shown[: NUM_SHOWN - len(wrong[:1])], *wrong[:1]])


def _right(answered: str, sample: Sample) -> bool:
    return answered.rpartition(" (")[0] == sample.expected


@torch.no_grad()
def probabilities(model: Any, rows: Sequence[EncodedRow], collate: Collator) -> Tensor:
    """Return each row's class probabilities, ``[rows, classes]`` in fp32 on the CPU."""
    device = next(model.parameters()).device
    found, order = [], []
    with evaluating(model):
        for numbers in bounded_batches(rows):
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in numbers]).items()}
            found.append(forward(model, batch).float().softmax(-1).cpu())
            order += numbers
    return torch.cat(found)[torch.tensor(order).argsort()]


def questions(tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]) -> tuple[EncodedRow, ...]:
    """Choose the rows to answer: all for a classifier, for a writer the first few that leave room for an answer.

    For language modeling the prompt is a text's opening, and what follows it is expected.
    """
    if spec.labels:
        return tuple(rows)
    tried = [row if spec.task == "generation" else _opening(tokenizer, row) for row in rows[: 4 * NUM_WRITTEN]]
    return tuple([row for row in tried if row.prompt.strip() and _fits(tokenizer, spec, row.prompt)][:NUM_WRITTEN])


def _opening(tokenizer: PreTrainedTokenizerBase, row: EncodedRow) -> EncodedRow:
    parts = row.input_ids[:PROMPT_TOKENS], row.input_ids[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
    opening, rest = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
    return dataclasses.replace(row, prompt=opening, expected=rest)


def _fits(tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, prompt: str) -> bool:
    if spec.encoder_decoder:
        return len(source_tokens(tokenizer, [source_text(tokenizer, prompt, spec.chat)])[0]) <= spec.max_length
    return len(prompt_tokens(tokenizer, prompt, spec.chat, spec.separator)) + _room(spec) <= spec.max_length


def _room(spec: TaskSpec) -> int:
    return max(1, min(NEW_TOKENS, spec.max_length // 2))
