"""Tiny real models with files of examples, and the command run in processes of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD, BAD = ("good", "fine", "nice"), ("bad", "poor", "sad")
FILLER = (
    "the",
    "movie",
    "was",
    "a",
    "film",
    "it",
    "very",
    "and",
    "what",
    "is",
    "my",
    "say",
    "hello",
    "cat",
    "dog",
    "?",
)
WORDS = ("<unk>", "</s>", "<pad>", *GOOD, *BAD, *FILLER)
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}

Command = Callable[..., "Done"]


class Done:
    """A finished command."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def json(self) -> Any:
        """Return stdout, all of it, as JSON."""
        return json.loads(self.stdout)

    @property
    def message(self) -> str:
        """Return what the command said of its failure: from 'lorakit: ' on, without the prefix."""
        return self.stderr[self.stderr.index("lorakit: ") :].removeprefix("lorakit: ").strip()


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a command: the checkout's package, one thread, nothing of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORAKIT", "PYTHONWARNINGS"))}
    return kept | {
        "PYTHONPATH": str(REPOSITORY / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(home),
        "COLUMNS": "200",
    }


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a command."""
    stdout, stderr = process.communicate(timeout=120)
    return Done(process.returncode, stdout, stderr)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts ``lorakit`` with arguments, in a folder."""
    home = tmp_path_factory.mktemp("home")

    def started(*arguments: object, cwd: Path, before: tuple[str, ...] = (), **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*before, sys.executable, "-m", "lorakit", *(str(argument) for argument in arguments)],
            cwd=cwd,
            env=environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    return started


@pytest.fixture(scope="session")
def lorakit(start: Callable[..., subprocess.Popen[str]]) -> Command:
    """Return a function that runs ``lorakit`` with arguments, in a folder, and waits for it."""

    def run(*arguments: object, cwd: Path) -> Done:
        return finish(start(*arguments, cwd=cwd))

    return run


def quick(*arguments: object) -> Done:
    """Run a command in this process."""
    from typer.testing import CliRunner

    from lorakit.cli.main import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return Done(result.exit_code, result.stdout, result.stderr)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def opinions(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Make short texts whose label hangs on one word."""
    chance = random.Random(seed)
    rows = []
    for i in range(count):
        word = chance.choice(GOOD if i % 2 else BAD)
        text = " ".join([*chance.choices(FILLER, k=5), word, *chance.choices(FILLER, k=2)])
        rows.append({"text": text, "label": "positive" if i % 2 else "negative"})
    return rows


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two models, an encoder and a decoder, and rows for each task. Only read it."""
    # Imported here: the test session turns the network off before it loads any of this.
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save_model(BertForMaskedLM(BertConfig(**SIZES)), folder / "encoder")
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    save_model(LlamaForCausalLM(LlamaConfig(**SIZES, **special)), folder / "decoder")
    write_rows(folder / "opinions.jsonl", opinions(96))
    write_rows(folder / "test.jsonl", opinions(20, seed=1))
    chance = random.Random(0)
    asked = [{"prompt": f"what is {chance.choice(FILLER)} {word}", "completion": f" my {word}"} for word in WORDS[3:]]
    write_rows(folder / "answers.jsonl", asked)
    texts = [{"text": " ".join(chance.choices(FILLER, k=24))} for _ in range(24)]
    write_rows(folder / "texts.jsonl", texts)
    return folder


@pytest.fixture(scope="session")
def classifier(place: Path) -> Path:
    """Return the run folder of a classifier."""
    rows = place / "opinions.jsonl"
    done = quick("train", place / "encoder", rows, "-o", place / "classifier", "--lr", 0.02, "--epochs", 5)
    assert done.code == 0, done.stderr
    return place / "classifier"


@pytest.fixture(scope="session")
def writer(place: Path) -> Path:
    """Return the run folder of a model that answers prompts."""
    done = quick("train", place / "decoder", place / "answers.jsonl", "-o", place / "writer", "--max-steps", 4)
    assert done.code == 0, done.stderr
    return place / "writer"
