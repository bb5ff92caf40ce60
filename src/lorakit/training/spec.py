"""``TaskSpec``: what must be known of a task to use its adapter later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import DataError
from lorakit.text.supervise import SEPARATOR
from lorakit.training.data.batches import Collator
from lorakit.training.data.detect import detect_task
from lorakit.training.data.encode import EncodedSet
from lorakit.training.data.layouts import Detection
from lorakit.training.data.table import Table
from lorakit.training.tasks import Task, find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskSpec:
    """A task as a run learned it; stored as ``task.json`` in the run folder.

    Attributes:
        task: the task's name, such as 'classification', 'generation' or 'language-modeling'.
        labels: class names in logit order.
        max_length: tokens per row.
        chat: prompts are written as a user's messages.
        encoder_decoder: the model reads the prompt and writes the completion on two sides.
        separator: what stands between prompt and completion.
        layout: the training rows' layout, such as 'instruction-output', whose prompts get a wording of their own.
        columns: pairs of field and column, where the rows' columns were mapped.
    """

    task: str
    labels: tuple[str, ...] = ()
    max_length: int = 512
    chat: bool = False
    encoder_decoder: bool = False
    separator: str = SEPARATOR
    layout: str = ""
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> Task:
        """All that can be done with examples of this task.

        Raises:
            ConfigError: this lorakit has no such task.
        """
        return find_task(self.task)(self)

    @property
    def peft_task(self) -> str:
        """PEFT's word for the task."""
        return self.kind.peft

    def encode(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Turn rows into tokens and labels."""
        return self.kind.encode(table, detection, tokenizer)

    def read(self, table: Table, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Recognise rows as this task's and encode them.

        Raises:
            DataError: they are of another task, or wrong.
        """
        detection = detect_task(table, self.task, dict(self.columns) or None)
        return self.encode(table, detection, tokenizer)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """Return what makes batches of encoded rows."""
        pad = tokenizer.pad_token_id
        if not isinstance(pad, int):
            raise DataError("the tokenizer has no padding token, so rows cannot share a batch.")
        return self.kind.collator(pad)
