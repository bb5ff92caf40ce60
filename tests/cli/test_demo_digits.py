"""`lorakit demo digits`: one run as a learner sees it, what it leaves behind, and what it refuses."""

from __future__ import annotations

import gzip
import json
import re
import signal
import struct
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.demos.digits import network
from lorakit.formats.store import read_adapter

from .conftest import Done, finish, quick

Start = Callable[..., subprocess.Popen[str]]

RUN = "lorakit-demo/digits"
FILES = ["alone", "base.safetensors", "digits.json", "digits.png", "replay", "report.html"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """Return a whole run on the bundled digits in 80 columns, and the folder in which the command was given."""
    pytest.importorskip("sklearn", reason="the extra 'demo' is not installed")
    place = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("COLUMNS", "80")
        done = quick("demo", "digits")
    assert done.code == 0, done.stderr
    return done, place


def summary(place: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((place / RUN / "digits.json").read_text(encoding="utf-8"))
    return value


def rows(text: str) -> dict[str, list[int]]:
    """Return the table of errors: digit -> images, before, alone, replay, disabled."""
    found = re.findall(r"^  (\d|all digits)(?:  <- trained)? +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) *$", text, re.MULTILINE)
    return {name: [int(number) for number in numbers] for name, *numbers in found}


def test_the_table_has_a_row_for_each_digit_and_its_sums(ran: tuple[Done, Path]) -> None:
    table = rows(ran[0].stdout)
    assert list(table) == [*"0123456789", "all digits"]
    sums = [sum(table[digit][column] for digit in "0123456789") for column in range(5)]
    assert sums == table["all digits"]


def test_the_worst_digit_is_mended_alone_and_with_replay(ran: tuple[Done, Path]) -> None:
    _, before, alone, replay, _ = rows(ran[0].stdout)[str(summary(ran[1])["digit"])]
    assert max(alone, replay) <= 0.3 * before


def test_alone_forgets_and_replay_does_not(ran: tuple[Done, Path]) -> None:
    _, before, alone, replay, _ = rows(ran[0].stdout)["all digits"]
    assert replay <= before < alone
    assert "This is forgetting" in ran[0].stdout


def test_disabled_is_what_it_was_before_for_each_digit(ran: tuple[Done, Path]) -> None:
    assert all(row[1] == row[4] for row in rows(ran[0].stdout).values())


@pytest.mark.parametrize("words", ["6,794 numbers", "0.242 %", "alpha / rank = 2 / 1 = 2", "898 of 898 predictions"])
def test_what_was_added_and_proven_is_printed(ran: tuple[Done, Path], words: str) -> None:
    assert words in " ".join(ran[0].stdout.split())


def test_nothing_is_wider_than_80_columns(ran: tuple[Done, Path]) -> None:
    tables, _, python = ran[0].stdout.partition("Run folder")
    assert max(map(len, tables.splitlines())) <= 80
    assert max(map(len, python.splitlines())) <= 80


def test_the_run_folder_holds_network_adapters_numbers_and_pictures(ran: tuple[Done, Path]) -> None:
    folder = ran[1] / RUN
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    network().load_state_dict(load_file(folder / "base.safetensors"))
    assert read_adapter(folder / "alone").sites.keys() == {"linear1", "linear2", "linear3"}


class Sources(HTMLParser):
    """The tags of a page and the addresses it loads from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]


def test_the_report_needs_no_network_and_no_script(ran: tuple[Done, Path]) -> None:
    html = (ran[1] / RUN / "report.html").read_text(encoding="utf-8")
    page = Sources(html)
    assert len(page.addresses) > 10
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_python_that_is_printed_makes_the_same_errors_again(
    ran: tuple[Done, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(line[2:] for line in ran[0].stdout.partition("or, in Python\n")[2].splitlines())
    monkeypatch.chdir(ran[1])
    exec(code, {})
    _, before, alone, replay, _ = rows(ran[0].stdout)["all digits"]
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [f"None {before} errors", f"alone {alone} errors", f"replay {replay} errors"]


def test_the_adapter_can_be_inspected_as_printed(ran: tuple[Done, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    command = re.search(r"^  lorakit (inspect .*)$", ran[0].stdout, re.MULTILINE)
    assert command is not None
    monkeypatch.chdir(ran[1])
    assert "6,794 numbers" in quick(*command.group(1).split()).stdout


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Return a folder with few images of noise as MNIST's gzipped test files: a run on them is short."""
    folder = tmp_path / "noise"
    folder.mkdir()
    pixels = torch.randint(256, (200, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, magic, sizes, entries in (
        ("images-idx3", 0x803, (200, 28, 28), pixels.numpy().tobytes()),
        ("labels-idx1", 0x801, (200,), bytes(range(10)) * 20),
    ):
        header = struct.pack(f">{1 + len(sizes)}I", magic, *sizes)
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(header + entries))
    return folder


def test_json_is_the_summary_and_where_it_lies(noise: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = quick("demo", "digits", "--data", noise, "--digit", 3, "--output", run, "--json").json
    places = {"run": str(run), "report": str(run / "report.html"), "picture": str(run / "digits.png")}
    assert found == json.loads((run / "digits.json").read_text()) | places
    assert (found["digit"], found["asked"], found["num_test"]) == (3, True, 40)


def test_the_demo_is_listed() -> None:
    assert [demo["name"] for demo in quick("demo", "--json").json] == ["text", "digits"]


def test_help_has_every_option_and_an_example() -> None:
    text = " ".join(quick("demo", "digits", "--help").stdout.split())
    assert [name for name in ("--data", "--output", "--seed", "--digit", "--json") if name not in text] == []
    assert "Example: lorakit demo digits --seed 1" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "nowhere"), "'nowhere': there is no such folder"),
        (("--data", "."), "has none of MNIST's files. Looked for 'train-images-idx3-ubyte'"),
        (("--output", "thesis"), "no digits.json), so it is not replaced"),
    ],
    ids=["no folder", "no files", "a folder of something else"],
)
def test_bad_input_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").touch()
    done = quick("demo", "digits", *arguments)
    assert done.code == 2
    assert said in done.message
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]


@pytest.mark.parametrize("digit", ["10", "-1", "seven"])
def test_what_is_no_digit_is_refused(digit: str) -> None:
    done = quick("demo", "digits", "--digit", digit)
    assert done.code == 2
    assert "--digit" in done.stderr


@pytest.mark.parametrize("stage", ["training the network", "drawing the report"])
def test_an_interruption_leaves_nothing(start: Start, noise: Path, tmp_path: Path, stage: str) -> None:
    (tmp_path / "here").mkdir()
    process = start("demo", "digits", "--data", noise, cwd=tmp_path / "here")
    assert process.stderr is not None
    assert any(line.startswith(stage) for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert done.message == "interrupted; nothing was left half-written."
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "here").iterdir()) == []
