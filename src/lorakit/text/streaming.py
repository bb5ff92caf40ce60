"""What streaming needs: tokens out of the model's thread, text out of tokens, and what was read before."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TokenQueue:
    """Takes tokens from ``generate`` of ``transformers`` in one thread, and gives them out in another."""

    def __init__(self) -> None:
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, which is dropped, then one token at a time."""
        if self._prompt_seen:
            self._tokens.put(int(value.reshape(-1)[0]))
        self._prompt_seen = True

    def end(self) -> None:
        """Take the end of the answer."""
        self._tokens.put(None)

    def __iter__(self) -> Iterator[int]:
        """Yield new tokens until the end."""
        return iter(self._tokens.get, None)


class Spelling:
    """Spells tokens as text, piece by piece; the pieces joined are the text of all tokens at once.

    Every token is spelled together with all before it, because tokenizers join spaces and bytes over tokens. What
    the next token could still change is held back: the bytes of a character that is not whole, and what may be the
    start of a mark.

    Attributes:
        text: what has been given out.
        over: a mark was written; it and what follows are no part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marks: Sequence[str] = ()) -> None:
        """Begin an answer that ends before the first of ``marks``."""
        self._tokenizer, self._marks = tokenizer, marks
        self._ids: list[int] = []
        self.text = ""
        self.over = False

    def add(self, token: int) -> str:
        """Take one more token and return the text that is certain now, often none."""
        if self.over:
            return ""
        self._ids.append(token)
        spelled = self._spelled()
        places = [place for place in (spelled.find(mark) for mark in self._marks) if place >= 0]
        if places:
            self.over = True
            return self._given_out(spelled[: min(places)])
        certain = spelled.rstrip(_UNFINISHED)
        return self._given_out(certain[: len(certain) - self._begun(certain)])

    def finish(self) -> str:
        """Return what was held back, as no token follows."""
        return "" if self.over else self._given_out(self._spelled())

    def _spelled(self) -> str:
        spelled = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(spelled)

    def _begun(self, text: str) -> int:
        """Return how many last characters may be the start of a mark."""
        lengths = [n for mark in self._marks for n in range(1, len(mark)) if text.endswith(mark[:n])]
        return max(lengths, default=0)

    def _given_out(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece


class Past:
    """The keys and values of tokens that a model has read, for the next prompt that begins with them.

    Reading the rest of a prompt behind them is the same sum as reading it all, in another order: logits differ by
    rounding alone. Where more than that could differ (layers with a state that cannot be cut back, rotary
    embeddings whose frequencies follow the length), nothing is kept.

    Attributes:
        ids: the tokens that were read.
        reused: how many of the last prompt's tokens did not have to be read again.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.reused = 0
        self._cache: DynamicCache | None = None

    def before(self, model: PreTrainedModel, prompt: Sequence[int]) -> DynamicCache | None:
        """Return a cache that holds the longest known beginning of ``prompt``, at least one token short of it.

        None where the model cannot go on from one; it then reads every prompt whole.
        """
        shared = min(_shared(self.ids, prompt), len(prompt) - 1)
        if self._cache is None or not _cut_back(self._cache, len(self.ids) - shared):
            self._cache, shared = _new_cache(model), 0
        self.reused = shared
        self.ids = list(prompt[:shared])
        return self._cache

    def after(self, read: Sequence[int]) -> None:
        """Note what the cache holds now: the beginning of ``read``, of which the last token is not read yet."""
        self.ids = [] if self._cache is None else list(read[: self._cache.get_seq_length()])

    def forget(self) -> None:
        """Drop everything, as after a failure within the model."""
        self.ids, self._cache = [], None


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _new_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Return an empty cache of the model's kind, or None where prompts must be read whole."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    owner: Any = model
    config = model.config.get_text_config(decoder=True)
    facts = config.to_dict()
    rotary = str(facts.get("rope_parameters") or facts.get("rope_scaling") or "")
    if model.config.is_encoder_decoder or "dynamic" in rotary or "longrope" in rotary:
        return None
    if not owner._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=config)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if plain and cache.layers else None


def _cut_back(cache: DynamicCache, count: int) -> bool:
    """Take the last ``count`` tokens out of a cache; False where it has not kept what that needs."""
    from transformers.cache_utils import DynamicLayer

    if count == 0:
        return True
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    cache.crop(-count)
    return True
