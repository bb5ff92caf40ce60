"""A few held-out rows answered, before and after: predictions of a classifier, continuations of a writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.records import Sample
from lorakit.text.generate import generate
from lorakit.text.supervise import prompt_tokens, source_text, source_tokens
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.objectives import bounded_batches, evaluating, forward
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
    """Answer rows with the model as it is now: all of them for a classifier, a few for a writer."""
    if spec.labels:
        shares = probabilities(model, rows, spec.collator(tokenizer))
        best = shares.max(-1)
        return [f"{spec.labels[int(i)]} ({float(p):.2f})" for p, i in zip(best.values, best.indices, strict=True)]
    prompts = [prompt for prompt, _ in questions(tokenizer, spec, rows)]
    return generate(model, tokenizer, prompts, _room(spec), chat=spec.chat, separator=spec.separator)


def paired(
    before: Answers, after: Answers, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]
) -> tuple[Sample, ...]:
    """Put answers from before and after side by side; of a classifier's those first that changed to right."""
    if not spec.labels:
        asked = questions(tokenizer, spec, rows)
        return tuple(Sample(p, e, b, a) for (p, e), b, a in zip(asked, before, after, strict=True))
    found = [Sample(row.prompt, row.expected, b, a) for row, b, a in zip(rows, before, after, strict=True)]
    seen: set[str] = set()
    present = {row.expected for row in rows}
    shown: list[Sample] = []
    for sample in sorted(found, key=lambda s: not (_right(s.after, s) and not _right(s.before, s))):
        if sample.expected not in seen or seen == present:
            seen.add(sample.expected)
            shown.append(sample)
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


def questions(
    tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]
) -> list[tuple[str, str]]:
    """Return the first prompts that leave room for an answer, each with what is expected.

    For language modeling the prompt is a text's opening, and its rest is expected.
    """
    if spec.task == "generation":
        asked = [(row.prompt, row.expected) for row in rows[: 4 * NUM_WRITTEN]]
    else:
        asked = [_opening(tokenizer, row) for row in rows[: 4 * NUM_WRITTEN]]
    fitting = [pair for pair in asked if pair[0].strip() and _fits(tokenizer, spec, pair[0])]
    return fitting[:NUM_WRITTEN]


def _opening(tokenizer: PreTrainedTokenizerBase, row: EncodedRow) -> tuple[str, str]:
    parts = row.input_ids[:PROMPT_TOKENS], row.input_ids[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
    opening, rest = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
    return opening, rest


def _fits(tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, prompt: str) -> bool:
    if spec.encoder_decoder:
        return len(source_tokens(tokenizer, [source_text(tokenizer, prompt, spec.chat)])[0]) <= spec.max_length
    return len(prompt_tokens(tokenizer, prompt, spec.chat, spec.separator)) + _room(spec) <= spec.max_length


def _room(spec: TaskSpec) -> int:
    return max(1, min(NEW_TOKENS, spec.max_length // 2))
