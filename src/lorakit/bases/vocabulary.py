"""More tokens for a base: its tokenizer learns them, its embedding and its head get a row for each.

A new token's row is the mean of the rows of the pieces by which the tokenizer wrote it before (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models", takes the mean of all rows, as is done here for a
token that had no pieces). Nothing is drawn: the same tokenizer makes the same rows of the same base anywhere. Which
pieces those were is read from the extended tokenizer itself, by taking the new tokens out of it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapters.targets import base_modules
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import ConfigError, ModelError, quoted
from lorakit.layers import find_ops
from lorakit.layers.embedding import EmbeddingOps
from lorakit.layers.linear import LinearOps
from lorakit.layers.ops import Runs, host_class
from lorakit.layers.site import spelled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a tokenizer has and its model was not trained with.

    Attributes:
        tokens: as the tokenizer spells them.
        ids: their numbers, rising.
        pieces: the tokens that stood for each before; empty where there were none.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]

    @property
    def runs(self) -> Runs:
        """The numbers as runs ``[start, stop)``."""
        found: list[tuple[int, int]] = []
        for number in self.ids:
            if found and found[-1][1] == number:
                found[-1] = found[-1][0], number + 1
            else:
                found.append((number, number + 1))
        return tuple(found)

    def rows_of(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return their rows as ``train_modules`` names them: ``('model.embed_tokens[32000:32010]', ...)``."""
        return tuple(f"{path}[{spelled(self.runs)}]" for path in table_paths(model))


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Teach a tokenizer new tokens (changed in place), and return their numbers.

    Raises:
        ConfigError: it has some of them already; all are named, and nothing is changed.
    """
    known = tokenizer.get_vocab()
    taken = set(known.values())
    there = [token for token in tokens if token in known]
    if there:
        raise ConfigError(f"the tokenizer has {quoted(there)} already: leave out what is no new token.")
    tokenizer.add_tokens(list(tokens))
    vocabulary = tokenizer.get_vocab()
    numbers = [int(vocabulary.get(token, -1)) for token in tokens]
    refused = [token for token, number in zip(tokens, numbers, strict=True) if number < 0 or number in taken]
    if refused:
        raise ConfigError(f"the tokenizer cannot take {quoted(refused)} as tokens. Write them otherwise.")
    return tuple(sorted(numbers))


def new_tokens(tokenizer: PreTrainedTokenizerBase, num_rows: int, added: Sequence[int] = ()) -> NewTokens | None:
    """Return the tokens that are new to a model with ``num_rows`` rows: those added, and all beyond its table."""
    spelling = {int(number): token for token, number in tokenizer.get_vocab().items()}
    ids = sorted({*added, *(number for number in spelling if number >= num_rows)})
    if not ids:
        return None
    return NewTokens(tuple(spelling[i] for i in ids), tuple(ids), _pieces(tokenizer, ids, spelling))


def num_tokens(model: PreTrainedModel) -> int:
    """Return how many tokens a model's input embedding has rows for.

    Raises:
        ModelError: it has no embedding that could have more.
    """
    return int(_embedding(model).weight.shape[0])


def table_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of a model's input embedding and of its output head over tokens, if it has one."""
    tables = {id(module): module for module in (_embedding(model), _head(model)) if module is not None}
    paths = {id(module): path for path, module in reversed(base_modules(model).items())}
    return tuple(paths[number] for number in tables)


@torch.no_grad()
def grow(model: PreTrainedModel, ids: Sequence[int], pieces: Sequence[Sequence[int]] = ()) -> None:
    """Give a frozen model (changed in place) rows for new tokens, each the mean of those of its pieces.

    Rows that a table has already, as where it was padded, are written as well: no token was behind them.

    Args:
        model: the base.
        ids: the new tokens' numbers, rising.
        pieces: numbers of the tokens that stood for each; without any, the mean of all other rows is taken.

    Raises:
        ModelError: the model's tables cannot grow.
    """
    before, head = _embedding(model), _head(model)
    tied = head is not None and head.weight is before.weight
    starts = _starts(before.weight, ids, pieces)
    head_starts = None if head is None or tied else _starts(head.weight, ids, pieces)
    bias_starts = None if head is None or head.bias is None else _starts(head.bias, ids, pieces)
    if ids[-1] >= before.weight.shape[0]:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):  # whatever it draws is written over
            model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    table, head = _embedding(model), _head(model)
    short = [m for m in (table, head) if m is not None and m.weight.shape[0] <= ids[-1]]
    if short:
        raise ModelError(f"the {host_class(short[0]).__name__} of a {_kind(model)} cannot have more tokens.")
    index = torch.tensor(ids)
    table.weight.data[index] = starts
    if head is not None and head_starts is not None:
        head.weight.data[index] = head_starts
    if head is not None and bias_starts is not None:
        head.bias.data[index] = bias_starts
    model.requires_grad_(False)


def _starts(table: Tensor, ids: Sequence[int], pieces: Sequence[Sequence[int]]) -> Tensor:
    """Return the rows that new tokens start with, ``[n, ...]`` in the table's dtype; means are taken in fp32."""
    others = torch.ones(table.shape[0], dtype=torch.bool)
    others[[i for i in ids if i < table.shape[0]]] = False
    mean = table[others.to(table.device)].float().mean(0)
    chosen = [table[list(own)].float().mean(0) if own else mean for own in pieces or [()] * len(ids)]
    return torch.stack(chosen).to(table.dtype)


def _embedding(model: PreTrainedModel) -> Any:
    try:
        found: Any = model.get_input_embeddings()
    except NotImplementedError:
        found = None
    if not isinstance(find_ops(found) if isinstance(found, nn.Module) else None, EmbeddingOps):
        what = f"is a {host_class(found).__name__}" if isinstance(found, nn.Module) else "is none"
        raise ModelError(f"a {_kind(model)} cannot have more tokens: its input embedding {what}, not an nn.Embedding.")
    return found


def _head(model: PreTrainedModel) -> Any:
    find: Any = model.get_output_embeddings
    found: Any = find()
    if found is not None and not isinstance(find_ops(found), LinearOps):
        kind = host_class(found).__name__
        raise ModelError(f"a {_kind(model)} cannot have more tokens: its head is a {kind}, not an nn.Linear.")
    return found


def _kind(model: PreTrainedModel) -> str:
    return host_class(model).__name__


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], spelling: dict[int, str]
) -> tuple[tuple[int, ...], ...]:
    """Return the tokens by which the tokenizer without ``ids`` writes each of these; none for what it cannot read."""
    before = _without(tokenizer, frozenset(ids))
    if before is None:
        return ((),) * len(ids)
    added = {number for number in ids if number in tokenizer.added_tokens_decoder}
    texts = [spelling[number] if number in added else tokenizer.decode([number]) for number in ids]
    unknown = {tokenizer.unk_token_id, None}
    return tuple(
        tuple(number for number in before.encode(str(text), add_special_tokens=False).ids if number not in unknown)
        for text in texts
    )


def _without(tokenizer: Any, ids: frozenset[int]) -> Any:
    """Return a tokenizer of the ``tokenizers`` library as it was before it had ``ids``; None where none can be made."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] not in ids]
    model = content["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: a piece's number is its place
        if any(i not in ids for i in range(min(ids), len(vocabulary))):
            return None
        model["vocab"] = vocabulary[: min(ids)]
    elif isinstance(vocabulary, dict):
        kept = {token: number for token, number in vocabulary.items() if number not in ids}
        model["vocab"] = kept
        if "merges" in model:
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            fits = [a in kept and b in kept and a + b in kept for a, b in pairs]
            model["merges"] = [pair for pair, fit in zip(model["merges"], fits, strict=True) if fit]
    return Tokenizer.from_str(json.dumps(content))
