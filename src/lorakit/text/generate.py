"""Let a model go on from prompts, from the very tokens that training started its completions from."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.errors import InputError
from lorakit.text.chat import Messages, end_of_turn_ids
from lorakit.text.streaming import Past, Spelling, TokenQueue
from lorakit.text.supervise import SEPARATOR, prompt_tokens, source_text, source_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Messages

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int | None = None,
    batch_size: int = 8,
    separator: str = SEPARATOR,
) -> list[str]:
    """Write on from each prompt.

    Args:
        model: a causal or encoder-decoder language model; left in the training mode it was in.
        tokenizer: the model's.
        prompts: texts, or conversations.
        max_new_tokens: stop after this many, if no end of sequence or of turn came before.
        chat: the prompts are a user's messages.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        seed: makes sampling repeatable, and leaves PyTorch's generator as it was.
        batch_size: prompts at a time.
        separator: as ``prompt_tokens`` takes it.

    Returns:
        The new text alone, in the prompts' order; with chat without white space around it.

    Raises:
        InputError: a prompt and ``max_new_tokens`` do not fit in the context (each with its counts).
    """
    rows = _prompt_rows(model, tokenizer, prompts, max_new_tokens, chat, separator)
    config = _generation_config(model, tokenizer, max_new_tokens, chat, temperature)
    ends = ending_ids(model, tokenizer, chat)
    write: Any = model.generate
    texts: list[str] = []
    with evaluating(model), _own_defaults(model, config), _seeded(model, seed):
        for start in range(0, len(rows), batch_size):
            inputs = _left_padded(rows[start : start + batch_size], config.pad_token_id, model.device)
            output = write(**inputs, generation_config=config)
            new = output if model.config.is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]
            written = [[token for token in row if token not in ends] for row in new.tolist()]
            texts += tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts] if chat else texts


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int = 256,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int | None = None,
    separator: str = SEPARATOR,
) -> Iterator[str]:
    """Write on from one prompt and yield the new text, exactly as written, piece by piece.

    The model runs in a thread; closing the iterator stops it after the token under way.

    Raises:
        InputError: as ``generate``.
    """
    (row,) = _prompt_rows(model, tokenizer, [prompt], max_new_tokens, chat, separator)
    ends = ending_ids(model, tokenizer, chat)
    spelling = Spelling(tokenizer)
    tokens = stream_tokens(model, tokenizer, row, max_new_tokens, chat, temperature, seed)
    with contextlib.closing(tokens):
        yield from filter(None, (spelling.add(token) for token in tokens if token not in ends))
    rest = spelling.finish()
    if rest:
        yield rest


def stream_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_new_tokens: int,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int | None = None,
    past: Past | None = None,
) -> Generator[int]:
    """Write on from tokens and yield each new one, the one that ends the answer included.

    Args:
        model: as ``generate`` takes it.
        tokenizer: the model's.
        ids: the prompt; what an encoder reads where the model has one.
        max_new_tokens: stop after this many.
        chat: the end of a turn ends the answer.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        seed: of the sampling.
        past: what was read before, by the same model with the same adapters acting; it notes what is read now.
    """
    from transformers import StoppingCriteriaList

    config = _generation_config(model, tokenizer, max_new_tokens, chat, temperature)
    inputs: dict[str, Any] = _left_padded([ids], config.pad_token_id, model.device)
    if past and (cache := past.before(model, ids)) is not None:
        inputs["past_key_values"] = cache
    queue = TokenQueue()
    closed = threading.Event()
    failures: list[BaseException] = []
    write: Any = model.generate

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

    criteria = StoppingCriteriaList([stop])

    def run() -> None:
        try:
            with _seeded(model, seed):
                output = write(**inputs, generation_config=config, streamer=queue, stopping_criteria=criteria)
            if past:
                past.after(output[0].tolist())
        except BaseException as error:  # raised again in the reader's thread
            if past:
                past.forget()
            failures.append(error)
            queue.end()

    with evaluating(model), _own_defaults(model, config):
        worker = threading.Thread(target=run, name="lorakit-generate", daemon=True)
        worker.start()
        try:
            yield from queue
        finally:
            closed.set()
            worker.join()
    if failures:
        raise failures[0]


def ending_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> list[int]:
    """Return the tokens that end an answer: those the model names, the end of sequence, with chat the end of turn."""
    own: Any = model.generation_config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    chosen = end_of_turn_ids(tokenizer) if chat else [tokenizer.eos_token_id]
    return ends + [token for token in chosen if isinstance(token, int) and token not in ends]


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has; None where they are not counted (as in T5)."""
    config = model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    length = config.to_dict().get(name)
    return length if isinstance(length, int) else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _prompt_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    chat: bool,
    separator: str,
) -> list[list[int]]:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; at least 1 new token can be asked for.")
    if not prompts:
        return []
    if model.config.is_encoder_decoder:
        rows = source_tokens(tokenizer, [source_text(tokenizer, prompt, chat) for prompt in prompts])
        room = context_length(model)
    else:
        rows = [prompt_tokens(tokenizer, prompt, chat, separator) for prompt in prompts]
        context = context_length(model)
        room = None if context is None else context - max_new_tokens
    empty = [str(number) for number, row in enumerate(rows, start=1) if not row]
    if empty:
        raise InputError(f"prompt {', '.join(empty)} is empty. Give the model at least one token to start from.")
    long = [(number, len(row)) for number, row in enumerate(rows, start=1) if room is not None and len(row) > room]
    if long:
        counts = ", ".join(f"prompt {number} has {length:,} tokens" for number, length in long[:8])
        rest = f" and {len(long) - 8:,} more" if len(long) > 8 else ""
        raise InputError(
            f"{counts}{rest}; with {max_new_tokens:,} new ones the context of {context_length(model):,} "
            f"tokens leaves room for {max(room or 0, 0):,}. Shorten the prompt or ask for fewer new tokens."
        )
    return rows


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    chat: bool,
    temperature: float,
) -> GenerationConfig:
    from transformers import GenerationConfig

    if temperature < 0:
        raise InputError(f"temperature is {temperature}; it must be 0 (no sampling) or above.")
    ends = ending_ids(model, tokenizer, chat)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else (ends or [0])[0]
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        num_beams=1,
        use_cache=True,
        **sampling,
    )


def _left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@contextlib.contextmanager
def _own_defaults(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Set aside what the model's own generation defaults say against ``config``; ``transformers`` would warn."""
    original = model.generation_config
    defaults = copy.deepcopy(original)
    for name in ("max_length", *(() if config.do_sample else _SAMPLING)):
        setattr(defaults, name, None)
    model.generation_config = defaults
    try:
        yield
    finally:
        model.generation_config = original


@contextlib.contextmanager
def _seeded(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
