"""``Conversation``: turns with a model, streamed, with whoever is to answer chosen turn by turn.

    talk = Conversation(model, tokenizer)
    for piece in talk.reply("What is it?"):
        print(piece, end="")
    with_base = talk.reply("And that?", Voice("base", handle.disabled), keep=False)

A prompt is what training rendered: the model's own chat template over all turns, or for a model that was trained
on single prompts the last question alone, worded and parted as its rows were.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.files import write_text
from lorakit.text.chat import chat_prompt
from lorakit.text.generate import context_length, ending_ids, stream_tokens
from lorakit.text.messages import Message
from lorakit.text.streaming import Past, Spelling
from lorakit.text.supervise import SEPARATOR, prompt_tokens, source_text, source_tokens
from lorakit.text.tokens import encode_passages, text_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Form:
    """How turns become a prompt.

    Attributes:
        chat: as messages, all of them; otherwise each question is a prompt of its own.
        separator: what parts a single prompt from its answer.
        worded: puts a single prompt as the training rows put theirs.
        marks: an answer ends before the first of these texts, which begin what only the user says.
        columns: of the rows that single prompts and their answers are saved as; one column takes both.
    """

    chat: bool = True
    separator: str = SEPARATOR
    worded: Callable[[str], str] = str
    marks: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("prompt", "completion")

    def prompt(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[Message], question: str
    ) -> list[int]:
        """Return the tokens that the answer to a question starts from (an encoder's, where the model has one).

        Raises:
            InputError: the question is empty.
            DataError: the chat template refuses the turns.
        """
        problem = "is empty" if not question.strip() else text_problem(question)
        if problem:
            raise InputError(f"the question {problem}. Ask another one.")
        asked: Any = [*messages, {"role": "user", "content": question}] if self.chat else self.worded(question)
        if model.config.is_encoder_decoder:
            return source_tokens(tokenizer, [source_text(tokenizer, asked, self.chat)])[0]
        if self.chat:
            return encode_passages(tokenizer, [chat_prompt(tokenizer, asked)])[0][0]
        return prompt_tokens(tokenizer, asked, separator=self.separator)


@dataclass(frozen=True)
class Settings:
    """How answers are written.

    Attributes:
        max_new_tokens: in one answer; fewer where the context has no room for them.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        seed: of the sampling; every answer starts from it. None draws anew.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Voice:
    """Who answers.

    Attributes:
        name: tells voices apart: one name, one set of weights.
        acts: within its block the model is this voice.
    """

    name: str = "model"
    acts: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass(frozen=True)
class Answer:
    """One answer, whole or as far as it came.

    Attributes:
        text: as it is kept; in a chat without white space around it.
        voice: who wrote it.
        messages: the conversation that ends with it.
        tokens: how many were written, the one that ends the answer included.
        prompt_tokens: how many the prompt has; ``reused`` of them had been read before.
        seconds: from the question to the last token.
        ended: 'end' (the model's own end), 'mark', 'length' (``max_new_tokens``), 'context' or 'interrupted'.
        kept: the conversation goes on from it. An answer without a word cannot be gone on from.
    """

    text: str
    voice: str
    messages: tuple[Message, ...]
    tokens: int
    prompt_tokens: int
    reused: int
    seconds: float
    ended: str
    kept: bool


@dataclass
class _Written:
    tokens: int = 0
    ended: str = "interrupted"
    started: float = field(default_factory=time.perf_counter)


class Conversation:
    """A conversation with one model.

    Attributes:
        turns: what the user and the assistant said, in turns; every question is answered.
        settings: how answers are written.
        form: how turns become a prompt.
        last: the last answer; None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        form: Form | None = None,
        settings: Settings | None = None,
        system: str = "",
        reuse: bool = True,
    ) -> None:
        """Begin a conversation.

        Args:
            model: a causal or encoder-decoder language model.
            tokenizer: the model's.
            form: as the model was trained; None for a chat.
            settings: how answers are written.
            system: what the model is told before the first turn.
            reuse: keep keys and values of what was read, per voice.

        Raises:
            InputError: a system text where each prompt stands alone.
        """
        self._model, self._tokenizer, self._reuse = model, tokenizer, reuse
        self.form, self.settings = form or Form(), settings or Settings()
        self.turns: list[Message] = []
        self.last: Answer | None = None
        self._system = ""
        self._pasts: dict[str, Past] = {}
        self.tell(system)

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, and the turns."""
        told: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        return [*told, *(dict(turn) for turn in self.turns)]

    def tell(self, system: str) -> None:
        """Set what the model is told before the first turn; '' for nothing. The turns stay.

        Raises:
            InputError: each prompt stands alone, so that there is no place for it.
        """
        if system.strip() and not self.form.chat:
            raise InputError(
                "a system text was given, but the model was trained on single prompts, which have no place for one. "
                "Put it into the prompt."
            )
        self._system = system.strip()

    def reset(self) -> None:
        """Forget every turn; the system text stays."""
        self.turns.clear()
        self._pasts.clear()

    def reply(self, question: str, voice: Voice | None = None, keep: bool = True) -> Generator[str]:
        """Answer a question, piece by piece; ``last`` has the whole answer afterwards.

        Closing the iterator, or a Ctrl-C within it, stops the answer, which is kept as far as it came.

        Args:
            question: the user's turn.
            voice: who answers; None is the model as it is.
            keep: go on from this answer.

        Raises:
            InputError: the question is empty, or the conversation leaves no room in the context.
            DataError: the chat template refuses the turns.
        """
        voice = voice or Voice()
        prompt = self.form.prompt(self._model, self._tokenizer, self.messages, question)
        room = self._room(prompt)
        past = self._past(voice)
        spelling = Spelling(self._tokenizer, self.form.marks)
        written = _Written()
        try:
            # The model's thread has ended when the pieces are closed, so the voice changes after that only.
            with voice.acts(), contextlib.closing(self._pieces(prompt, room, past, spelling, written)) as pieces:
                yield from pieces
        except (GeneratorExit, KeyboardInterrupt):
            self._take(question, voice, keep, len(prompt), past, spelling, written)
            raise
        self._take(question, voice, keep, len(prompt), past, spelling, written)

    def rows(self) -> list[dict[str, Any]]:
        """Return the conversation as rows to train on: one of messages, or one per single prompt."""
        if self.form.chat:
            return [{"messages": self.messages}] if self.turns else []
        said = [turn["content"] for turn in self.turns]
        pairs = zip(said[::2], said[1::2], strict=True)
        columns = self.form.columns
        return [dict(zip(columns, pair if len(columns) == 2 else ["".join(pair)], strict=True)) for pair in pairs]

    def save(self, path: str | Path, force: bool = False) -> int:
        """Write ``rows`` as JSONL, whole or not at all; return how many they are.

        Raises:
            InputError: there is nothing to save, or the file exists and ``force`` is not set.
        """
        file = Path(path).expanduser()
        rows = self.rows()
        if not rows:
            raise InputError(f"'{file}' was not written: nothing has been said yet.")
        if file.exists() and not force:
            raise InputError(f"'{file}' exists already. Choose another name, or replace it with --force.")
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return len(rows)

    def _past(self, voice: Voice) -> Past:
        """Return what a voice has read; only that of the last two is kept, for it takes memory."""
        past = self._pasts.pop(voice.name, None) or Past()
        if self._reuse:
            self._pasts[voice.name] = past
        for name in list(self._pasts)[:-2]:
            del self._pasts[name]
        return past

    def _room(self, prompt: list[int]) -> int:
        """Return how many tokens may be written."""
        most = self.settings.max_new_tokens
        if most < 1:
            raise InputError(f"max_new_tokens is {most}; at least 1 new token can be asked for.")
        context = context_length(self._model)
        if context is None or self._model.config.is_encoder_decoder:
            return most
        if len(prompt) >= context:
            what = "the conversation" if self.turns and self.form.chat else "the question"
            raise InputError(
                f"{what} has {len(prompt):,} tokens; the model's context of {context:,} leaves no room for an answer. "
                "Begin a new conversation, or ask a shorter question."
            )
        return min(most, context - len(prompt))

    def _pieces(
        self, prompt: list[int], room: int, past: Past, spelling: Spelling, written: _Written
    ) -> Generator[str]:
        """Yield the text that each token settles, and note how many there were and why there are no more."""
        settings, chat = self.settings, self.form.chat
        ends = ending_ids(self._model, self._tokenizer, chat)
        tokens = stream_tokens(
            self._model, self._tokenizer, prompt, room, chat, settings.temperature, settings.seed, past
        )
        ended = "length" if room == settings.max_new_tokens else "context"
        with contextlib.closing(tokens):
            for token in tokens:
                written.tokens += 1
                if token in ends:
                    ended = "end"
                    break
                piece = spelling.add(token)
                if piece:
                    yield piece
                if spelling.over:
                    ended = "mark"
                    break
        rest = spelling.finish()
        if rest:
            yield rest
        written.ended = ended

    def _take(
        self,
        question: str,
        voice: Voice,
        keep: bool,
        prompt_tokens: int,
        past: Past,
        spelling: Spelling,
        written: _Written,
    ) -> None:
        text = spelling.text.strip() if self.form.chat else spelling.text
        turns: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        messages = (*self.messages, *turns) if self.form.chat else tuple(turns)
        kept = keep and bool(text.strip())
        if kept:
            self.turns += turns
        self.last = Answer(
            text=text,
            voice=voice.name,
            messages=messages,
            tokens=written.tokens,
            prompt_tokens=prompt_tokens,
            reused=past.reused,
            seconds=time.perf_counter() - written.started,
            ended=written.ended,
            kept=kept,
        )
