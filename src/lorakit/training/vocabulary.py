"""More tokens for a run: which they are, and what of the tables is trained.

Tokens are new where the settings add them, or where a base's tokenizer has more of them than its embedding has rows.
``train_vocabulary`` says what is trained beside the adapter: the 'new' rows of embedding and head, both of them in
'full' (as for Chinese LLaMA: Cui, Yang and Yao 2023, arXiv 2304.08177), or 'none' of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.bases import Base
from lorakit.bases.tokenizer import ensure_padding
from lorakit.bases.vocabulary import NewTokens, add_tokens, grow, new_tokens, num_tokens, table_paths
from lorakit.errors import ConfigError, ModelError
from lorakit.training.config import TrainConfig
from lorakit.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_SHOWN = 6


def extended_tokenizer(tokenizer: PreTrainedTokenizerBase, num_rows: int, config: TrainConfig) -> NewTokens | None:
    """Add the tokens of the settings to a tokenizer (changed in place) and return what is new to a model.

    Args:
        tokenizer: the base's.
        num_rows: tokens that the base's embedding has rows for.
        config: the settings.

    Raises:
        ConfigError: it has some of them already, or new tokens are to be trained and there are none.
    """
    added = add_tokens(tokenizer, config.add_tokens) if config.add_tokens else ()
    new = new_tokens(tokenizer, num_rows, added)
    if new is None and config.train_vocabulary == "new":
        raise ConfigError(
            "train_vocabulary='new' trains the rows of new tokens, and there are none: name them in add_tokens, or "
            "train_vocabulary='full' for all of embedding and head."
        )
    return new


def extended(base: Base, config: TrainConfig, recipe: Recipe | None = None) -> Base:
    """Give a loaded base the tokens of the settings and those that its tokenizer has beyond its rows.

    Model and tokenizer are changed in place; ``recipe`` notes what was done.

    Raises:
        ConfigError: see :func:`extended_tokenizer`.
        ModelError: its tables cannot grow.
    """
    try:
        rows = num_tokens(base.model)
    except ModelError:
        if config.add_tokens or config.train_vocabulary not in (None, "none"):
            raise
        return base
    new = extended_tokenizer(base.tokenizer, rows, config)
    if new is not None:
        grow(base.model, new.ids, new.pieces)
    if recipe is not None and (new is not None or config.train_vocabulary is not None):
        recipe.say("vocabulary", *said(new, config))
    return dataclasses.replace(base, in_full=trained(base.model, new, config), extended=new is not None)


def trained(model: PreTrainedModel, new: NewTokens | None, config: TrainConfig) -> tuple[str, ...]:
    """Return what of the tables is trained, as ``train_modules`` names it."""
    if config.train_vocabulary == "full":
        return table_paths(model)
    return () if new is None or config.train_vocabulary == "none" else new.rows_of(model)


def said(new: NewTokens | None, config: TrainConfig) -> tuple[str, str]:
    """Return what was decided and why, in words."""
    what = {"full": "all of embedding and head is trained", "none": "none of it is trained"}
    how = what.get(config.train_vocabulary or "new", "the new rows of embedding and head are trained")
    if new is None:
        return "as it is", f"as asked: {how}"
    shown = " ".join(new.tokens[:MOST_SHOWN])
    more = len(new.tokens) - MOST_SHOWN
    value = f"{len(new.tokens):,} new: {shown}" + (f" and {more:,} more" if more > 0 else "")
    found = len(new.ids) - len(config.add_tokens or ())
    why = "as asked" if not found else f"the tokenizer has {found:,} tokens more than the model: rows added"
    starts = "the mean of the rows of its pieces" if any(new.pieces) else "the mean of all rows"
    return value, f"{why}; each starts as {starts}; {how}"


def in_run(base: Base, tokenizer: PreTrainedTokenizerBase) -> Base:
    """Give a base the tokenizer that lies beside an adapter, and rows for its tokens, where these are more.

    The rows are those that training started with.
    """
    own = base.tokenizer.get_vocab()
    added: Sequence[int] = [int(number) for token, number in tokenizer.get_vocab().items() if token not in own]
    try:
        new = new_tokens(tokenizer, num_tokens(base.model), added)
    except ModelError:
        return base
    if new is None:
        return base
    grow(base.model, new.ids, new.pieces)
    ensure_padding(base.model, tokenizer, required=False)
    return dataclasses.replace(base, tokenizer=tokenizer, extended=True)
