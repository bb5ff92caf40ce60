"""What tasks share whose model writes tokens: decoders and encoder-decoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lorakit.bases import model_kind
from lorakit.errors import ModelError
from lorakit.records import Evaluation
from lorakit.text.generate import generate
from lorakit.text.supervise import prompt_tokens, source_text, source_tokens
from lorakit.training.data.encode import IGNORED, EncodedRow
from lorakit.training.tasks.labelled import Labelled, logits_of, unwrapped
from lorakit.training.tasks.task import Usual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_WRITTEN = 3
NEW_TOKENS = 48


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
        inputs = dict(batch)
        if _is_encoder_decoder(model):
            inputs["decoder_input_ids"] = _shifted_right(model, batch["labels"])
        return logits_of(model, inputs, 3, "one score per word at every position")

    def predictions(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits of all supervised tokens; a decoder's at one position predict the next token."""
        logits, labels = self.outputs(model, batch), batch["labels"]
        if not _is_encoder_decoder(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        supervised = labels != IGNORED
        return logits[supervised], labels[supervised]

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


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """Return what the decoder reads: the start token, then the labels but the last; padding where masked."""
    config: Any = unwrapped(model).config
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
