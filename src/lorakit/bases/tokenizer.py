"""A base's tokenizer, and what it says about the base: its context length, whether it can chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lorakit.bases.quiet import quiet_transformers
from lorakit.bases.source import model_kind
from lorakit.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_LIMIT = 1_000_000
"""The context length of a model that states none (positions relative, no trained length written down)."""

_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model ``name`` (a folder or a hub name).

    Raises:
        ModelError: the model comes without a tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ModelError(
            f"'{name}' has no tokenizer that can be loaded: {first_line(error)} "
            "Put tokenizer.json and tokenizer_config.json of the model beside its config.json."
        ) from error
    return tokenizer


def ensure_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, required: bool) -> None:
    """Give tokenizer and model one padding token; writes to both.

    A tokenizer without one (GPT-2, LLaMA) pads with its end-of-text token. The model's config learns the
    id, because sequence classification finds the last real token by it. Padding rows of an embedding
    stay as they were built.

    Raises:
        ModelError: ``required`` and there is neither a padding nor an end-of-text token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            if required:
                raise ModelError(
                    "the tokenizer has neither a padding nor an end-of-text token, so texts of different "
                    "length cannot share a batch. Set pad_token in its tokenizer_config.json."
                )
            return
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens fit into one input: the least of what config, positions and tokenizer allow.

    RoBERTa and its kin number positions from ``padding_idx + 1`` on, so that their table of 514
    positions holds 512 tokens. ``NO_LIMIT`` where nothing states a length.
    """
    config = model.config.get_text_config()
    stated = [getattr(config, field, None) for field in _LENGTH_FIELDS]
    limits = [value for value in stated if isinstance(value, int) and 0 < value < NO_LIMIT]
    for path, module in model.named_modules():
        if not (path.endswith("position_embeddings") and isinstance(module, nn.Embedding)):
            continue
        if module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    if 0 < tokenizer.model_max_length < NO_LIMIT:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=NO_LIMIT)


def is_chat_model(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> bool:
    """Tell whether a model can write and its tokenizer knows how a conversation is laid out."""
    return bool(tokenizer.chat_template) and model_kind(model.config) != "encoder"
