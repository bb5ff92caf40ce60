"""``TaskSpec``: what must be known of a task to use its adapter later, and how rows become tokens for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import DataError
from lorakit.text.supervise import SEPARATOR
from lorakit.training.data.batches import Collator
from lorakit.training.data.detect import detect_task
from lorakit.training.data.encode import (
    EncodedSet,
    encode_classification,
    encode_generation,
    encode_language_modeling,
)
from lorakit.training.data.layouts import CLASSIFICATION, GENERATION, Detection
from lorakit.training.data.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEFT_TASKS = {"classification": "SEQ_CLS", "generation": "CAUSAL_LM", "language-modeling": "CAUSAL_LM"}


@dataclass(frozen=True)
class TaskSpec:
    """A task as a run learned it; stored as ``task.json`` in the run folder.

    Attributes:
        task: 'classification', 'generation' or 'language-modeling'.
        labels: class names in logit order.
        max_length: tokens per row.
        chat: prompts are written as a user's messages.
        encoder_decoder: the model reads the prompt and writes the completion on two sides.
        separator: what stands between prompt and completion.
        layout: the training rows' layout, such as 'instruction-output', whose prompts get a wording of their own.
    """

    task: str
    labels: tuple[str, ...] = ()
    max_length: int = 512
    chat: bool = False
    encoder_decoder: bool = False
    separator: str = SEPARATOR
    layout: str = ""

    @property
    def peft_task(self) -> str:
        """PEFT's word for the task."""
        return "SEQ_2_SEQ_LM" if self.encoder_decoder else PEFT_TASKS[self.task]

    def encode(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Turn rows into tokens and labels."""
        if self.task == CLASSIFICATION:
            return encode_classification(table, detection, tokenizer, self.labels, self.max_length)
        if self.task == GENERATION:
            return encode_generation(table, detection, tokenizer, self.max_length, self.chat, self.encoder_decoder)
        return encode_language_modeling(table, detection, tokenizer, self.max_length)

    def read(self, table: Table, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Recognise rows as this task's and encode them.

        Raises:
            DataError: they are of another task, or wrong.
        """
        detection = detect_task(table, self.task)
        return self.encode(table, detection, tokenizer)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return what makes batches of encoded rows."""
        pad = tokenizer.pad_token_id
        if not isinstance(pad, int):
            raise DataError("the tokenizer has no padding token, so rows cannot share a batch.")
        return Collator(pad, encoder_decoder=self.encoder_decoder, max_length=self.max_length)
