"""``lorakit chat RUN``: talk with a run in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output
from lorakit.errors import ConfigError, InputError, did_you_mean

if TYPE_CHECKING:
    from lorakit.text.conversation import Answer, Voice
    from lorakit.training.talk import Talk

COMMANDS = {
    "/adapter": "answer with the adapter (as at the start)",
    "/base": "answer with the base alone",
    "/both": "answer with both, one under the other; the adapter's answer is kept",
    "/strength NUMBER": "how strongly the adapter acts: 1 as trained, 0 not at all",
    "/system TEXT": "what the model is told before the first turn; without TEXT nothing",
    "/reset": "forget every turn; the system text stays",
    "/save FILE": "write the turns as JSONL that `lorakit train` reads; --force replaces FILE",
    "/help": "show this",
    "/exit": "end; so do Ctrl-D, and Ctrl-C where no answer is being written",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Talk with a run.",
        epilog='Example: lorakit chat runs/first --system "Answer in one sentence."',
    )(chat)


def chat(
    run: options.RunFolder,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told before the first turn.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max-tokens", help="Tokens in one answer at most.")
    ] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, draws one.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the drawing; each answer starts from it.")] = None,
    base: options.BaseModel = None,
    device: options.Device = "auto",
    dtype: options.BaseDtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each answer.")] = False,
) -> None:
    """Talk with a run, in the form it was trained on; the adapter can be switched within.

    In a terminal /help lists what can be done, and Ctrl-C stops an answer. From a pipe each line is a turn.
    """
    from lorakit.cli.progress import Watch
    from lorakit.text.conversation import Settings
    from lorakit.training.talk import open_talk

    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1.")
    if temperature < 0:
        raise ConfigError(f"--temperature is {temperature:g}; it must be 0 (the likeliest token) or above.")
    with Watch() as watch:
        watch.stage("loading the run")
        talk = open_talk(
            run,
            base,
            settings=Settings(max_new_tokens, temperature, seed),
            system=system,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    if talk.note:
        output.note(talk.note)
    if sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history and can be edited
        Terminal(talk).run(typed())
    else:
        answer_lines(talk, sys.stdin, as_json)


def typed() -> Iterator[str]:
    """Yield what the user types, line by line, until Ctrl-D, or Ctrl-C at the prompt."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def answer_lines(talk: Talk, lines: Iterable[str], as_json: bool) -> None:
    """Answer each line that is not blank, with nothing but the answers on stdout."""
    from lorakit.errors import DataError

    voice = talk.adapter
    for number, line in enumerate(lines, start=1):
        question = line.rstrip("\r\n")
        if not question.strip():
            continue
        try:
            for piece in talk.conversation.reply(question, voice):
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except InputError as error:
            kind = DataError if isinstance(error, DataError) else InputError
            raise kind(f"line {number}: {error}") from error
        answer = talk.conversation.last
        assert answer is not None
        if as_json:
            output.show_json_line(answer_json(answer, talk.strength))
            sys.stdout.flush()
        else:
            print(flush=True)


def answer_json(answer: Answer, strength: float) -> dict[str, object]:
    """Return an answer as one JSON object: the messages up to it, and how it came about."""
    return {
        "messages": list(answer.messages),
        "text": answer.text,
        "adapter": answer.voice != "base",
        "strength": strength,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "seconds": round(answer.seconds, 4),
        "ended": answer.ended,
    }


class Terminal:
    """A talk in a terminal: questions are answered as they come, lines that begin with '/' are commands."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.who = "adapter"
        self._console = output.results()

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until they end or one says /exit."""
        self._dim("/help lists what can be done; Ctrl-C stops an answer, Ctrl-D ends.")
        for line in lines:
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line.strip():
                    self._answer(line[1:] if line.startswith("//") else line)
            except InputError as error:
                output.say(str(error))
            except KeyboardInterrupt:
                print()
                self._dim("stopped")

    def _answer(self, question: str) -> None:
        talk = self.talk
        if self.who == "both":
            self._heading("base")
            self._stream(question, talk.base, keep=False)
            self._heading(talk.adapter.name)
        elif self.who == "base":
            self._heading("base")
        elif talk.strength != 1:
            self._heading(talk.adapter.name)
        self._stream(question, talk.base if self.who == "base" else talk.adapter)

    def _stream(self, question: str, voice: Voice, keep: bool = True) -> None:
        from lorakit.reports import wording

        with contextlib.closing(self.talk.conversation.reply(question, voice, keep)) as pieces:
            for piece in pieces:
                sys.stdout.write(wording.printable(piece))
                sys.stdout.flush()
        answer = self.talk.conversation.last
        assert answer is not None
        print()
        self._dim(self._how(answer, keep))

    def _how(self, answer: Answer, keep: bool) -> str:
        from lorakit.reports import wording

        how = f"{wording.plural(answer.tokens, 'token')} in {answer.seconds:.1f} s"
        if answer.ended == "length":
            how += f"; cut at {self.talk.conversation.settings.max_new_tokens:,} (--max-new-tokens)"
        elif answer.ended == "context":
            how += "; cut where the model's context is full (/reset begins anew)"
        if keep and not answer.kept:
            how += "; no words, so the turn is not kept"
        return how

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        actions: dict[str, Callable[[str], None]] = {
            "/adapter": self._choose,
            "/base": self._choose,
            "/both": self._choose,
            "/strength": self._strengthen,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }
        if name not in actions:
            raise InputError(
                f"there is no command '{name}'.{did_you_mean(name, actions)} /help lists them; '//' begins a text "
                "with a slash."
            )
        actions[name](rest.strip() if name in ("/strength", "/system", "/save") else name)

    def _choose(self, name: str) -> None:
        self.who = name.removeprefix("/")
        said = {"adapter": "the adapter answers", "base": "the base alone answers", "both": "both answer"}
        self._dim(said[self.who])

    def _strengthen(self, text: str) -> None:
        try:
            strength = float(text)
        except ValueError:
            strength = float("nan")
        if not abs(strength) < float("inf"):
            raise InputError(f"/strength takes a number, such as 0.5; got '{text}'.")
        self.talk.strength = strength
        self._dim(f"the adapter acts at {strength:g}" + (" (1 is as trained)" if strength != 1 else ", as trained"))

    def _system(self, text: str) -> None:
        self.talk.conversation.tell(text)
        self._dim(f"the model is told: {text}" if text else "the model is told nothing before the first turn")

    def _reset(self, _: str) -> None:
        self.talk.conversation.reset()
        self._dim("every turn is forgotten")

    def _save(self, text: str) -> None:
        from lorakit.reports import wording

        words = text.split()
        file = text.replace("--force", "", 1).strip() if "--force" in words else text
        if not file:
            raise InputError("/save takes a file, such as: /save talk.jsonl")
        count = self.talk.conversation.save(file, force="--force" in words)
        self._dim(f"{wording.plural(count, 'row')} written to {file}")

    def _help(self, _: str) -> None:
        from rich.table import Table
        from rich.text import Text

        laid = Table.grid(padding=(0, 2))
        for name, what in COMMANDS.items():
            laid.add_row(Text(name, style="bold", no_wrap=True), Text(what))
        output.show(laid)

    def _heading(self, name: str) -> None:
        from rich.text import Text

        self._console.print(Text(name, style="bold"))

    def _dim(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text, style="dim"), soft_wrap=True)
