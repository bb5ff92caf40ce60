"""Talking with a run: its conversation in the form it was trained on, and who answers in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import InputError
from lorakit.text.chat import has_chat_template
from lorakit.text.conversation import Conversation, Form, Settings, Voice
from lorakit.training.run_files import read_spec
from lorakit.training.runs import Run, open_run

USER_BEGINS = "\n### User:"
INSTRUCTION_BEGINS = "\n### Instruction:"


@dataclass
class Talk:
    """A conversation with a run.

    Attributes:
        run: the opened run.
        conversation: with its model.
        note: what a user should know of the form of its prompts; '' for a model's own chat template.
        strength: the adapter's: 1 as trained, 0 none.
    """

    run: Run
    conversation: Conversation
    note: str = ""
    strength: float = 1.0

    @property
    def base(self) -> Voice:
        """The base alone."""
        return Voice("base", self.run.handle.disabled)

    @property
    def adapter(self) -> Voice:
        """Every adapter of the run, at the strength that is set."""
        weights = dict.fromkeys(self.run.handle.adapters, self.strength)
        name = "adapter" if self.strength == 1 else f"adapter at {self.strength:g}"
        return Voice(name, lambda: self.run.handle.using(weights))


def open_talk(
    folder: str | Path,
    base: str | None = None,
    *,
    settings: Settings | None = None,
    system: str = "",
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Talk:
    """Open a run, or a bare PEFT folder, to talk with it.

    Args:
        folder: as ``open_run`` takes it, with the rest.
        base: the base's folder or hub name.
        settings: how answers are written.
        system: what the model is told before the first turn.
        device: 'auto' takes a GPU if there is one.
        dtype: of the base.
        trust_remote_code: let code of the model's repository run.

    Raises:
        InputError: the run is a classifier, or has no place for a system text.
        RunFolderError: as ``open_run``.
    """
    folder = Path(folder).expanduser()
    if (folder / "task.json").is_file():
        check_writes(folder, read_spec(folder).task)
    run = open_run(folder, base, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    check_writes(folder, run.spec.task)
    conversation = Conversation(run.base.model, run.base.tokenizer, form_of(run), settings, system)
    return Talk(run, conversation, form_note(run))


def check_writes(folder: Path, task: str) -> None:
    """Raise an InputError for a run that labels texts instead of writing them."""
    if task == "classification":
        raise InputError(
            f"run '{folder}' is for classification; 'chat' needs a run that writes. Use `lorakit predict {folder}`."
        )


def form_of(run: Run) -> Form:
    """Return the form of the prompts that a run was trained on."""
    spec = run.spec
    if spec.chat:
        own = has_chat_template(run.base.tokenizer)
        return Form(marks=() if own else (USER_BEGINS,))
    if spec.layout == "instruction-output":
        columns, marks = ("instruction", "output"), (INSTRUCTION_BEGINS,)
        return Form(chat=False, separator=run.separator, worded=run.worded, marks=marks, columns=columns)
    if spec.task == "language-modeling":
        return Form(chat=False, separator=run.separator, columns=("text",))
    return Form(chat=False, separator=run.separator)


def form_note(run: Run) -> str:
    """Say what is not as in a chat with a model that has a template of its own."""
    if run.spec.chat:
        own = has_chat_template(run.base.tokenizer)
        return "" if own else "the model has no chat template; turns are written as in training ('### User:' ...)."
    how = {"instruction-output": "an instruction", "plain": "a text to go on from"}
    kind = "plain" if run.spec.task == "language-modeling" else run.spec.layout
    return (
        f"this run was trained on single prompts, not on conversations: each line is {how.get(kind, 'a prompt')} of "
        "its own, in the form of training, and earlier turns are not read."
    )
