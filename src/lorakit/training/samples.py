"""A few held-out rows answered, before and after: predictions of a classifier, continuations of a writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.records import Sample
from lorakit.text.generate import generate
from lorakit.training.data.batches import Collator, ordered_batches
from lorakit.training.data.encode import EncodedRow
from lorakit.training.objectives import evaluating, forward
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
    prompts = [prompt for prompt, _ in _prompts(tokenizer, spec, rows)]
    room = max(1, min(NEW_TOKENS, spec.max_length - PROMPT_TOKENS - 1))
    fitting = [p for p in prompts if len(tokenizer(p)["input_ids"]) + room + 8 <= spec.max_length]
    return generate(model, tokenizer, fitting, room, chat=spec.chat, separator=spec.separator) if fitting else []


def paired(before: Answers, after: Answers, rows: Sequence[EncodedRow], spec: TaskSpec) -> tuple[Sample, ...]:
    """Put answers from before and after side by side; of a classifier's those first that changed to right."""
    if not spec.labels:
        given = [(row.prompt, row.expected) for row in rows[:NUM_WRITTEN]]
        return tuple(Sample(p, e, b, a) for (p, e), b, a in zip(given, before, after, strict=False))
    found = [Sample(row.prompt, row.expected, b, a) for row, b, a in zip(rows, before, after, strict=True)]
    seen: set[str] = set()
    shown: list[Sample] = []
    for sample in sorted(found, key=lambda s: not (_right(s.after, s) and not _right(s.before, s))):
        if sample.expected not in seen or len(seen) == len(spec.labels):
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
        for numbers in ordered_batches([len(row.input_ids) for row in rows], 64):
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in numbers]).items()}
            found.append(forward(model, batch).float().softmax(-1).cpu())
            order += numbers
    return torch.cat(found)[torch.tensor(order).argsort()]


def _prompts(
    tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]
) -> list[tuple[str, str]]:
    if spec.task == "generation":
        return [(row.prompt, row.expected) for row in rows[:NUM_WRITTEN]]
    openings = [tokenizer.decode(row.input_ids[:PROMPT_TOKENS], skip_special_tokens=True) for row in rows[:NUM_WRITTEN]]
    return [(str(text), "") for text in openings if str(text).strip()]
