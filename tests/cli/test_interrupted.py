"""Ctrl-C, a full disk, a reader that goes away and a bug of ours: what is left and what is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.formats.store import read_adapter

from .conftest import REPOSITORY, Done, environment, finish, quick

Start = Callable[..., subprocess.Popen[str]]

WAIT_S = 60
LONG = ("--epochs", 3000, "--batch-size", 8)
# Enough for a run to begin on (64 MiB must be free), little enough to be filled at once.
DISK_MIB = 66


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something has happened in a command that still runs."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.02)


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


@pytest.fixture(scope="module")
def stopped(place: Path, start: Start) -> tuple[Done, Path]:
    """Return a training that was interrupted after some steps, and its run folder."""
    folder = place / "stopped"
    process = start("train", "encoder", "opinions.jsonl", "-o", "stopped", *LONG, cwd=place)
    wait_for(lambda: num_lines(folder / "metrics.jsonl") >= 3, process)
    process.send_signal(signal.SIGINT)
    return finish(process), folder


def test_an_interrupted_training_says_where_its_adapter_is(stopped: tuple[Done, Path]) -> None:
    done, _ = stopped
    assert done.code == 130
    assert done.message == (
        "interrupted: the adapter so far is saved whole in 'stopped'.\ngo on with: lorakit resume stopped"
    )
    assert "interrupted after step" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_training_leaves_an_adapter_that_works(stopped: tuple[Done, Path], place: Path) -> None:
    _, folder = stopped
    assert json.loads((folder / "run.json").read_text())["finished"] is False
    assert quick("eval", folder, place / "test.jsonl", "--json").code == 0


def test_a_run_that_was_killed_goes_on_with_resume(place: Path, start: Start) -> None:
    folder = place / "killed"
    often = ("--save-every", 1, "--max-steps", 300, "--epochs", 100)
    process = start("train", "encoder", "opinions.jsonl", "-o", "killed", *often, cwd=place)
    wait_for(lambda: num_lines(folder / "metrics.jsonl") >= 5, process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    done = quick("resume", folder, "--json")
    assert done.code == 0, done.stderr
    assert '{"kind": "resumes", "step": ' in done.stderr
    assert done.json["finished"] is True
    assert done.json["num_steps"] == 300
    again = quick("resume", folder)
    assert (again.code, again.message.startswith("the run in ")) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_loses_nothing(place: Path, start: Start, number: int) -> None:
    name = f"twice-{int(number)}"
    process = start("train", "encoder", "opinions.jsonl", "-o", name, *LONG, cwd=place)
    wait_for(lambda: num_lines(place / name / "metrics.jsonl") >= 3, process)
    process.send_signal(number)
    process.send_signal(number)
    done = finish(process)
    assert done.code == 130
    assert f"go on with: lorakit resume {name}" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((place / name / "checkpoints").iterdir())) >= 1


def test_an_interruption_before_the_first_step_leaves_nothing(place: Path, start: Start, tmp_path: Path) -> None:
    process = start("train", place / "encoder", place / "opinions.jsonl", *LONG, cwd=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline() == "reading the data\n"
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert "lorakit: interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def own_disk(folder: Path) -> tuple[str, ...]:
    """Return the start of a command that gets a small disk of its own at ``folder``; skip where that cannot be."""
    if shutil.which("unshare") is None:
        pytest.skip("no 'unshare' here: a small disk cannot be made for one process")
    mount = f'mount -t tmpfs -o size={DISK_MIB}m tmpfs "{folder}" && exec "$@"'
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not make a small disk for one process")
    return command


def test_a_full_disk_loses_no_adapter(place: Path, start: Start, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    run = disk / "run"
    process = start(
        "train", place / "encoder", place / "opinions.jsonl", "-o", run, *LONG, cwd=tmp_path, before=own_disk(disk)
    )
    inside = Path(f"/proc/{process.pid}/root")  # the disk is seen by that process alone
    wait_for(lambda: num_lines(inside / run.relative_to("/") / "metrics.jsonl") >= 3, process)
    with (inside / disk.relative_to("/") / "filler").open("wb", buffering=0) as filler:
        filling = True
        while filling:
            try:
                filler.write(bytes(4096))
            except OSError:
                filling = False
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 1
    assert done.message.startswith("the disk is full: ")
    assert "Traceback" not in done.stderr
    rescued = Path(done.message.partition("saved whole in '")[2].partition("'")[0])
    assert len(read_adapter(rescued).sites) > 0


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lorakit", "methods"]
    done = subprocess.run(command, env=environment(tmp_path), stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""


def test_a_bug_of_ours_keeps_its_traceback_and_asks_to_be_reported(tmp_path: Path) -> None:
    program = (
        "from lorakit.cli import main\n"
        "@main.app.command('broken')\n"
        "def broken() -> None:\n"
        "    raise ZeroDivisionError('a bug')\n"
        "raise SystemExit(main.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "broken"],
        env=environment(tmp_path) | {"PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr
    assert done.stderr.endswith("Please report it with the command and the lines above.\n")


def test_debug_shows_the_traceback_of_a_refusal(place: Path, start: Start) -> None:
    done = finish(start("--debug", "eval", "nowhere", "test.jsonl", cwd=place))
    assert done.code != 0
    assert "Traceback" in done.stderr
    assert "report it" not in done.stderr
