"""Language modeling: plain text, of which every token is learned."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.training.data.encode import EncodedRow, EncodedSet, encode_language_modeling
from lorakit.training.data.layouts import LANGUAGE_MODELING, Detection
from lorakit.training.data.table import Table
from lorakit.training.tasks.writing import NEW_TOKENS, Writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.training.spec import TaskSpec

PROMPT_TOKENS = 16


class LanguageModeling(Writing):
    """Texts to go on from."""

    name: ClassVar[str] = LANGUAGE_MODELING
    peft = "CAUSAL_LM"

    @classmethod
    def fitted(cls, spec: TaskSpec, model: Any, tokenizer: PreTrainedTokenizerBase) -> TaskSpec:
        """Return the spec as it is: text is text."""
        return spec

    def encode(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Turn texts into tokens, all of them learned."""
        return encode_language_modeling(table, detection, tokenizer, self.spec.max_length)

    def question(self, tokenizer: PreTrainedTokenizerBase, row: EncodedRow) -> EncodedRow:
        """Ask with a text's opening; what follows it is expected."""
        parts = row.input_ids[:PROMPT_TOKENS], row.input_ids[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
        opening, rest = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts)
        return dataclasses.replace(row, prompt=opening, expected=rest)
