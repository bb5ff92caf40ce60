"""What tasks share whose model writes tokens: decoders and encoder-decoders."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.bases import model_kind
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import ModelError
from lorakit.kernels import fast
from lorakit.kernels.head_loss import IDENTITY, Curve, head_guesses, head_loss
from lorakit.records import Evaluation
from lorakit.text.generate import evaluating, generate
from lorakit.text.supervise import prompt_tokens, source_text, source_tokens
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import IGNORED, EncodedRow
from lorakit.training.tasks.cross_entropy import summed_cross_entropy
from lorakit.training.tasks.labelled import Labelled, logits_of, unwrapped
from lorakit.training.tasks.shortcuts import (
    NONE,
    Shortcuts,
    alike,
    before_head,
    curve_of,
    frozen_head,
    head_at,
    head_of,
    rows_at,
    same_loss,
)
from lorakit.training.tasks.task import Usual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_WRITTEN = 3
NEW_TOKENS = 48
TRIED = 13


class Writing(Labelled):
    """Texts to write; a unit is a supervised token."""

    usual: ClassVar[Usual] = Usual(
        batch_size=8, batch_size_of_many=8, fewest_steps=200, epochs=2, most_epochs=3, max_length=2048
    )

    @classmethod
    def check_model(cls, model: nn.Module, labels: Sequence[str]) -> None:
        """Refuse an encoder."""
        if model_kind(model.config) == "encoder":  # type: ignore[arg-type]
            kind = type(model).__name__
            raise ModelError(f"{kind} is an encoder: it reads text but does not write it, so it cannot do {cls.name}.")

    def units(self, row: EncodedRow) -> int:
        """Return the number of supervised tokens; a decoder has nothing to predict the first token from."""
        assert isinstance(row.labels, list)
        labels = row.labels if self.spec.encoder_decoder else row.labels[1:]
        return sum(label != IGNORED for label in labels)

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return logits ``[B, T, words]``."""
        inputs: dict[str, Any] = dict(batch)
        if _is_encoder_decoder(model):
            inputs["decoder_input_ids"] = _shifted_right(model, batch["labels"])
        if _takes_use_cache(type(unwrapped(model)).forward):
            inputs["use_cache"] = False  # keys and values are kept for writing on, which nobody does here
        return logits_of(model, inputs, 3, "one score per word at every position")

    def loss(self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE) -> Tensor:
        """Return the cross-entropy, see :class:`Task`."""
        found, truth, head = self._at_head(model, batch, shortcuts)
        if head is None:
            return summed_cross_entropy(found, truth)
        return head_loss(found, head.weight, head.bias, truth, shortcuts.curve or IDENTITY)

    def measured(
        self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the true and the likeliest words, see :class:`Labelled`."""
        found, truth, head = self._at_head(model, batch, shortcuts)
        if head is None:
            return summed_cross_entropy(found, truth), truth, found.argmax(-1)
        loss, guesses = head_guesses(found, head.weight, head.bias, truth, shortcuts.curve or IDENTITY)
        return loss, truth, guesses

    def predictions(
        self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of all supervised tokens; a decoder's at one position predict the next token."""
        found, truth, _ = self._at_head(model, batch, replace(shortcuts, curve=None))
        return found, truth

    def _at_head(
        self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts
    ) -> tuple[Tensor, Tensor, nn.Linear | None]:
        """Return what the head is for: hidden states ``[N, width]`` before it, the true words, and the head.

        Where the model has run its head itself: the logits ``[N, words]``, the true words, and None.
        """
        labels, places = _supervised(model, batch)
        shape = (labels.shape[0], labels.shape[1])
        truth = labels.flatten().index_select(0, places)
        inputs = {k: v for k, v in batch.items() if not (k == "attention_mask" and shortcuts.without_mask)}
        head = frozen_head(model) if shortcuts.curve is not None and fast() else None
        if head is not None:
            with before_head(head, places, shape) as hidden:
                logits = self.outputs(model, inputs)
            return (hidden[0], truth, head) if hidden else (rows_at(logits, places), truth, None)
        if not shortcuts.supervised_only:
            return rows_at(self.outputs(model, inputs), places), truth, None
        with head_at(model, places, shape):
            logits = self.outputs(model, inputs)
        gathered = logits.shape[:2] == (1, len(places))
        return logits[0] if gathered else rows_at(logits, places), truth, None

    def possible_shortcuts(self, model: nn.Module) -> Shortcuts:
        """Take a head that the model names; a mask is left out for decoders, whose tokens see what is before them.

        A compiled model gets none: the number of positions would be another in every step, and without values
        transformers makes a mask of its own.
        """
        if unwrapped(model) is not model:
            return NONE
        curve = IDENTITY if fast() and frozen_head(model) is not None else None
        return Shortcuts(head_of(model) is not None, not _is_encoder_decoder(model), curve)

    @torch.no_grad()
    def shortcuts(self, model: nn.Module, collate: Collator, rows: Sequence[EncodedRow]) -> Shortcuts:
        """Compare the logits of two short rows, one padded, with those of the whole computation; and the loss."""
        possible = self.possible_shortcuts(model)
        if possible == NONE:
            return NONE
        device = next(model.parameters()).device
        tried = _beginnings(rows, min(TRIED, self.spec.max_length))
        batch = {key: value.to(device) for key, value in collate(tried).items()}
        # Some models advise once to give a mask where there is padding; that advice is for other uses.
        with evaluating(model), quiet_transformers():
            expected = self.predictions(model, batch)[0]

            def holds(shortcuts: Shortcuts) -> bool:
                return alike(self.predictions(model, batch, shortcuts)[0], expected)

            supervised_only = possible.supervised_only and holds(Shortcuts(supervised_only=True))
            without_mask = possible.without_mask and holds(Shortcuts(without_mask=True))
            if without_mask:  # rounding could hide a little of the padding: other padding must change no bit
                first = self.predictions(model, batch, Shortcuts(without_mask=True))[0]
                ids = batch["input_ids"]
                other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, ids, ids[0, 0])}
                without_mask = torch.equal(first, self.predictions(model, other, Shortcuts(without_mask=True))[0])
            curve = self._curve(model, batch) if supervised_only and possible.curve is not None else None
        return Shortcuts(supervised_only, without_mask, curve)

    def _curve(self, model: nn.Module, batch: dict[str, Tensor]) -> Curve | None:
        """Return what the model makes of its head's scores, if loss and gradient without them are the model's own."""
        head, (labels, places) = frozen_head(model), _supervised(model, batch)
        shape = (labels.shape[0], labels.shape[1])
        assert head is not None

        def run() -> Tensor:
            return self.outputs(model, batch)

        curve = curve_of(head, places, shape, run)
        if curve is None:
            return None
        hidden, truth, taken = self._at_head(model, batch, Shortcuts(curve=curve))
        return curve if taken is not None and same_loss(head, curve, hidden, truth, shape, run) else None

    def scored(self, loss: float, num_rows: int, truth: Tensor, predicted: Tensor) -> Evaluation:
        """Return perplexity and the share of tokens predicted exactly."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        accuracy = int((predicted == truth).sum()) / max(len(truth), 1)
        return Evaluation(loss, num_rows, num_tokens=len(truth), perplexity=perplexity, accuracy=accuracy)

    def question(self, tokenizer: PreTrainedTokenizerBase, row: EncodedRow) -> EncodedRow:
        """Return a row as a question: its prompt, and what is expected after it."""
        return row

    def questions(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]) -> tuple[EncodedRow, ...]:
        """Choose the first few rows with different prompts that leave room for an answer."""
        tried = [self.question(tokenizer, row) for row in rows[: 16 * NUM_WRITTEN]]
        distinct = list({row.prompt: row for row in reversed(tried)}.values())[::-1]
        return tuple(
            [row for row in distinct if row.prompt.strip() and self._fits(tokenizer, row.prompt)][:NUM_WRITTEN]
        )

    def answer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]
    ) -> list[str]:
        """Return what the model writes after each prompt, the likeliest token each time, 48 at most."""
        spec, prompts = self.spec, [row.prompt for row in rows]
        return generate(model, tokenizer, prompts, self._room(), chat=spec.chat, separator=spec.separator)

    def _fits(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
        spec = self.spec
        if spec.encoder_decoder:
            return len(source_tokens(tokenizer, [source_text(tokenizer, prompt, spec.chat)])[0]) <= spec.max_length
        return len(prompt_tokens(tokenizer, prompt, spec.chat, spec.separator)) + self._room() <= spec.max_length

    def _room(self) -> int:
        return max(1, min(NEW_TOKENS, self.spec.max_length // 2))


def _supervised(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the word that each position is to predict, ``[B, T]``, and the supervised places of these, flattened."""
    labels = batch["labels"]
    if not _is_encoder_decoder(model):
        labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels, torch.arange(labels.numel(), device=labels.device)[(labels != IGNORED).flatten()]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


@functools.cache
def _takes_use_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def _beginnings(rows: Sequence[EncodedRow], most: int) -> list[EncodedRow]:
    """Return two rows of ``most`` tokens and about half of them, some supervised, made of the longest row's first."""
    row = max(rows, key=lambda row: len(row.input_ids))
    assert isinstance(row.labels, list)
    targets = [label for label in row.labels if label != IGNORED] or row.input_ids
    ids, targets, types = ((part * most)[:most] for part in (row.input_ids, targets, row.token_type_ids or []))
    masked = most // 3
    return [
        replace(row, input_ids=ids[:n], labels=[IGNORED] * masked + targets[masked:n], token_type_ids=types[:n] or None)
        for n in (most, most // 2 + 1)
    ]


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """Return what the decoder reads: the start token, then the labels but the last; padding where masked."""
    config: Any = unwrapped(model).config
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
