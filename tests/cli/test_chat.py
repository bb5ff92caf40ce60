"""Talking with runs: lines through a pipe, and commands in a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.adapters import attach
from lorakit.bases import load_base
from lorakit.cli.chat import COMMANDS, Terminal
from lorakit.formats.store import save_adapter
from lorakit.methods.lora import LoRA
from lorakit.text.conversation import Settings
from lorakit.training.data.read import read_table
from lorakit.training.runs import open_run
from lorakit.training.talk import Talk, open_talk

from .conftest import SIZES, Done, environment, finish, quick, save_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
QUESTIONS = ("what is my cat", "hello dog ?", "was it very good")


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEFT folder whose base has a chat template. Only read it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("talker")
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.5}
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 4096}, **special))
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # greedy answers have words alone, and never end by themselves
    save_model(model, folder / "base")
    settings = json.loads((folder / "base/tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "model_max_length": 4096}
    (folder / "base/tokenizer_config.json").write_text(json.dumps(settings))
    base = load_base(folder / "base", "generation")
    handle = attach(base.model, LoRA(rank=2), "all-linear", seed=0)
    for update in handle.updates().values():
        torch.nn.init.normal_(update.B, std=0.5)
    save_adapter(handle, folder / "run", base_name=str(folder / "base"), task_type="CAUSAL_LM")
    return folder / "run"


@pytest.fixture
def talk(talker: Path) -> Talk:
    """Return a talk whose answers are short."""
    return open_talk(talker, settings=Settings(max_new_tokens=6))


def piped(text: str, *arguments: object) -> Done:
    """Run ``lorakit chat`` in this process with lines on stdin."""
    from typer.testing import CliRunner

    from lorakit.cli.main import app

    result = CliRunner().invoke(app, ["chat", *(str(argument) for argument in arguments)], input=text)
    return Done(result.exit_code, result.stdout, result.stderr)


def test_each_piped_line_is_answered_and_nothing_else_is_printed(
    start: Callable[..., subprocess.Popen[str]], talker: Path, talk: Talk
) -> None:
    process = start("chat", "run", "--max-tokens", 6, "--system", "say hello", cwd=talker.parent)
    assert process.stdin is not None
    process.stdin.write(f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n")
    done = finish(process)
    assert done.code == 0, done.stderr
    talk.conversation.tell("say hello")
    expected = ["".join(talk.conversation.reply(question, talk.adapter)) for question in QUESTIONS[:2]]

    assert done.stdout == "".join(f"{answer}\n" for answer in expected)


def test_json_gives_one_object_for_each_answer(talker: Path) -> None:
    done = piped("\n".join(QUESTIONS), talker, "--max-new-tokens", 6, "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]

    assert [len(answer["messages"]) for answer in answers] == [2, 4, 6]
    assert [message["content"] for message in answers[-1]["messages"][::2]] == list(QUESTIONS)
    for answer in answers:
        assert answer["messages"][-1] == {"role": "assistant", "content": answer["text"]}
        assert (answer["adapter"], answer["strength"], answer["tokens"], answer["ended"]) == (True, 1.0, 6, "length")
        assert answer["seconds"] > 0


def test_a_run_of_single_prompts_answers_as_generate_and_says_so_once(writer: Path) -> None:
    done = piped("what is cat\nwhat is dog\n", writer, "--max-tokens", 6)

    assert done.stdout == "".join(text + "\n" for text in open_run(writer).generate(["what is cat", "what is dog"], 6))
    assert done.stderr.count("trained on single prompts") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{place}/classifier"], "Use `lorakit predict"),
        (["{place}/writer", "--system", "be kind"], "no place for one"),
        (["{place}/writer", "--max-new-tokens", "0"], "at least 1"),
        (["{place}/writer", "--temperature", "-1"], "--temperature is -1"),
        (["{place}/writr"], "Closest: 'writer'"),
        (["{place}/decoder"], "It is a model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_talked_with_is_refused(
    classifier: Path, writer: Path, place: Path, arguments: list[str], message: str
) -> None:
    done = quick("chat", *(argument.format(place=place) for argument in arguments))
    assert done.code == 2
    assert message in done.message
    assert done.stdout == ""


def test_a_line_that_does_not_fit_is_named(writer: Path) -> None:
    done = piped("\nwhat is cat\n" + "cat " * 40, writer)
    assert done.code == 2
    assert "line 3: the question has" in done.message


def entered(talk: Talk, *lines: str) -> None:
    """Type lines into a terminal's session."""
    Terminal(talk).run(iter(lines))


def test_both_answer_one_under_the_other(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    entered(talk, "/both", QUESTIONS[0])
    shown = capsys.readouterr().out
    own = talk.conversation.last
    assert own is not None
    assert own.voice == "adapter"
    talk.conversation.reset()
    base = "".join(talk.conversation.reply(QUESTIONS[0], talk.base))

    assert base.strip() != own.text
    assert shown.index("base\n" + base) < shown.index("adapter\n" + own.text)


def test_a_strength_of_nothing_is_the_base(talk: Talk) -> None:
    entered(talk, "/strength 0", QUESTIONS[0], "/base", "/reset", QUESTIONS[0])
    base = talk.conversation.last
    entered(talk, "/reset", QUESTIONS[0])
    none = talk.conversation.last
    entered(talk, "/strength 1", "/reset", QUESTIONS[0])
    own = talk.conversation.last

    assert base is not None
    assert none is not None
    assert own is not None
    assert (base.voice, none.voice, own.voice) == ("base", "adapter at 0", "adapter")
    assert base.text == none.text != own.text


def test_a_saved_talk_can_be_trained_on(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my talk.jsonl"
    entered(talk, "/system say hello", QUESTIONS[0], f"/save {file}", f"/save {file}", f"/save {file} --force")
    shown = capsys.readouterr()

    assert shown.out.count("1 row written") == 2
    assert "exists already" in shown.err
    rows = open_run(talk.run.folder).read(read_table(file)).rows
    assert len(rows) == 1
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "say hello"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bsae", "/base"),
        ("/strength much", "takes a number"),
        ("/strength nan", "takes a number"),
        ("/save", "takes a file"),
        ("/save talk.jsonl", "nothing has been said"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_and_the_talk_goes_on(
    talk: Talk, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    entered(talk, line, QUESTIONS[0], "/exit", QUESTIONS[1])

    assert message in capsys.readouterr().err
    assert len(talk.conversation.turns) == 2


def test_help_lists_every_command(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    entered(talk, "/help")
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in shown] == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_then_the_program(talker: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorakit", "chat", str(talker), "--max-new-tokens", "4000"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(tmp_path),
        # A shell starts its background jobs deaf to Ctrl-C, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        until("> ")
        os.write(ours, b"what is my cat\n")
        until("my cat\r\n")
        while len(seen) < 60:  # the answer has begun, also where the question was echoed twice
            seen += os.read(ours, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        until("stopped")
        until("> ")
        for _ in range(60):  # Python's input() sees a signal late that comes while it writes its prompt
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
