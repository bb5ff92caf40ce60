"""Generation: prompts and completions, instructions and outputs, conversations; what is given is not learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.bases import is_chat_model, model_kind
from lorakit.text.supervise import SEPARATOR
from lorakit.training.data.encode import EncodedSet, encode_generation
from lorakit.training.data.layouts import GENERATION, Detection
from lorakit.training.data.table import Table
from lorakit.training.tasks.writing import Writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.training.spec import TaskSpec


class Generation(Writing):
    """Answers to prompts, by a decoder or by an encoder-decoder."""

    name: ClassVar[str] = GENERATION

    @classmethod
    def fitted(cls, spec: TaskSpec, model: Any, tokenizer: PreTrainedTokenizerBase) -> TaskSpec:
        """Say whether prompts are messages, and whether the model has two sides."""
        import dataclasses

        return dataclasses.replace(
            spec,
            chat=spec.layout == "messages" or is_chat_model(tokenizer, model),
            encoder_decoder=model_kind(model.config) == "encoder-decoder",
            separator=SEPARATOR,
        )

    def encode(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Turn prompts and completions into tokens; prompts are masked."""
        spec = self.spec
        return encode_generation(table, detection, tokenizer, spec.max_length, spec.chat, spec.encoder_decoder)

    def encoded(self, found: EncodedSet) -> TaskSpec:
        """Take the separator that fits these completions."""
        return self.with_spec(separator=found.separator)

    @property
    def peft(self) -> str:
        """PEFT's word for the task."""
        return "SEQ_2_SEQ_LM" if self.spec.encoder_decoder else "CAUSAL_LM"
