"""The command ``lorakit``: its commands, and how errors end it.

Exit codes: 0 done, 1 our failure or the machine's, 2 the user's input, 130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorakit.cli import (
    chat,
    compress,
    demo,
    evaluate,
    generate,
    inspect,
    merge,
    methods,
    output,
    plan,
    predict,
    preview,
    resume,
    spectrum,
    train,
)
from lorakit.errors import LorakitError
from lorakit.training.processor import cores, limit_threads
from lorakit.version import __version__

INTERRUPTED = 130
# What the system refuses because of the place that was named.
_PLACE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR}


class Commands(TyperGroup):
    """Runs a command and turns deliberate errors into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except LorakitError as error:
            if _debug(ctx):
                raise
            output.say(str(error))
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if _debug(ctx) or error.errno not in _PLACE_ERRORS:
                raise
            output.say(f"'{error.filename}': {error.strerror}. Choose another place, or change its permissions.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            output.say("interrupted; nothing was left half-written.")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="lorakit",
    cls=Commands,
    help="Fine-tune a model with low-rank adapters, see that it worked, use it, merge it.",
    epilog="Example: lorakit train MODEL rows.jsonl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", envvar="LORAKIT_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that come before the command."""


for command in (
    train,
    resume,
    preview,
    plan,
    evaluate,
    predict,
    generate,
    chat,
    merge,
    inspect,
    spectrum,
    compress,
    methods,
):
    command.register(app)
app.add_typer(demo.app, name="demo")


def _debug(ctx: typer.Context) -> bool:
    return bool(ctx.params.get("debug"))


def _ask_to_report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if not isinstance(error, LorakitError):
        output.say("this is a bug of lorakit. Please report it with the command and the lines above.")


def main() -> int:
    """Run the command line and return the exit code."""
    sys.excepthook = _ask_to_report
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other packages' notices; `python -W default -m lorakit` shows them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    limit_threads(os.environ, cores())  # before torch is loaded, which reads it once
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # every retry would be told of; the error says it once
    logger = logging.getLogger("lorakit")
    logger.addHandler(output.NoteHandler())
    logger.propagate = False
    try:
        typer.main.get_command(app)(prog_name="lorakit")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    return code
