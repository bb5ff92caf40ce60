"""Several processes train as one does: the same losses, one adapter, one folder, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import ConfigError
from lorakit.training.processes import Processes, joined, started

Rows = Callable[..., list[dict[str, Any]]]
Bases = Callable[[str], Path]

REPOSITORY = Path(__file__).resolve().parents[2]
# fp32 sums of the same gradients in another order, through some AdamW steps, which divide by their roots.
LOSS_TOLERANCE = 1e-4
# No dropout: the masks of two processes are others than those of one.
SETTINGS = {"max_steps": 8, "lr": 5e-3, "batch_size": 5, "micro_batch": 2, "validation": 0.2, "seed": 1}


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORAKIT", "PYTHONWARNINGS"))}
    return kept | {
        "PYTHONPATH": str(REPOSITORY / "src"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(home),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def launched(count: int, home: Path, *program: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *program],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def accelerated(home: Path, *program: str) -> subprocess.CompletedProcess[str]:
    """Start through accelerate, whose own advice goes to stderr; on CPUs it starts several processes with this flag."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"]
    return subprocess.run(
        [sys.executable, *launcher, str(free_port()), *program],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def do(count: int, home: Path, job: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return launched(count, home, str(Path(__file__).with_name("several.py")), json.dumps(job))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def job(bases: Bases, rows_of: Rows, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a job: LLaMA, which has no dropout, on rows that do not part evenly."""
    place = tmp_path_factory.mktemp("several")
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of("prompted", 23)), encoding="utf-8")

    def make(output: Path, **more: Any) -> dict[str, Any]:
        settings = {**SETTINGS, **more.pop("settings", {}), "output": str(output)}
        return {"model": str(bases("llama")), "data": str(data), "settings": settings, **more}

    return make


def test_the_environment_of_a_launcher_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert started() == Processes(3, 2)
    assert not started().main


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not started().several


def test_a_launcher_that_says_too_little_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT, RANK is not set"), joined("cpu"):
        pass


@pytest.mark.parametrize(("size", "rank"), [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_the_environment_of_mpirun_counts_where_accelerate_used_it(
    monkeypatch: pytest.MonkeyPatch, size: str, rank: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(size, "2")
    monkeypatch.setenv(rank, "1")
    assert not started().several
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert started() == Processes(2, 1)


def test_accelerate_that_starts_one_process_for_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="starts only this one unless it goes through mpirun"):
        started()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_micro_batch_belongs_to_one_process(count: int) -> None:
    parts = list(range(5))
    shares = [list(Processes(count, rank).share(parts)) for rank in range(count)]
    assert sorted(part for share in shares for part in share) == parts


@pytest.fixture(scope="module")
def both(job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with a run of one process and the same run of two."""
    place = tmp_path_factory.mktemp("both")
    for count in (1, 2):
        done = do(count, place, job(place / f"run{count}"))
        assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(both: Path) -> None:
    for kind in ("train", "eval"):
        one, two = (lines(both / f"run{count}", kind) for count in (1, 2))
        assert [line["step"] for line in one] == [line["step"] for line in two]
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_two_processes_end_with_one_adapter(both: Path) -> None:
    first, second = (load_file(both / f"run2-rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_leave_the_folder_that_one_leaves(both: Path) -> None:
    one, two = (sorted(p.name for p in (both / f"run{count}").iterdir()) for count in (1, 2))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora", "increlora"])
def test_two_processes_choose_the_ranks_that_one_chooses(job: Any, tmp_path: Path, method: str) -> None:
    settings = {"method": method, "budget": 2500, "max_steps": 16, "lr": 0.03}
    for count in (1, 2):
        done = do(count, tmp_path, job(tmp_path / f"of{count}", settings=settings))
        assert done.returncode == 0, done.stderr
    names = ("of1-rank0", "of2-rank0", "of2-rank1")
    one, two, other = (load_file(tmp_path / f"{name}.safetensors") for name in names)
    assert list(one) == list(two)
    assert all(torch.equal(two[name], other[name]) for name in two)
    for name in one:  # gradients are summed in another order, and AdamW divides by the roots of small ones
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_exactly_with_dropout(job: Any, tmp_path: Path) -> None:
    more = {"settings": {"method": {"name": "lora", "rank": 4, "dropout": 0.2}, "save_every": 2}}
    assert do(2, tmp_path, job(tmp_path / "whole", **more)).returncode == 0
    assert do(2, tmp_path, job(tmp_path / "broken", break_at=5, **more)).returncode != 0
    alone = do(1, tmp_path, job(tmp_path / "broken", resume=True))
    assert "2 processes trained it, 1 would go on" in alone.stderr
    done = do(2, tmp_path, job(tmp_path / "broken", resume=True))
    assert done.returncode == 0, done.stderr
    whole, again = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken"))
    assert whole == again


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(job: Any, tmp_path: Path) -> None:
    done = do(2, tmp_path, job(tmp_path / "run", stop_at=3))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False
    assert len(lines(tmp_path / "run", "train")) == 3


@pytest.mark.slow
def test_the_command_runs_under_torchrun_and_prints_once(job: Any, tmp_path: Path) -> None:
    given = job(tmp_path / "run")
    arguments = ["train", given["model"], given["data"], "-o", str(tmp_path / "run"), "--max-steps", "4"]
    done = launched(2, tmp_path, "-m", "lorakit", *arguments, "--lr", "0.005", "--validation", "0.2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder") == 1
    assert done.stderr.count("reading the data") == 1
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_command_runs_under_accelerate_as_under_torchrun(job: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    given = job(tmp_path / "torchrun")
    more = ["--max-steps", "4", "--lr", "0.005", "--validation", "0.2", "--device", "cpu"]
    for name in ("torchrun", "accelerate"):
        program = ["-m", "lorakit", "train", given["model"], given["data"], "-o", str(tmp_path / name), *more]
        done = launched(2, tmp_path, *program) if name == "torchrun" else accelerated(tmp_path, *program)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Run folder") == 1
    first, second = (lines(tmp_path / name, "train") for name in ("torchrun", "accelerate"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


@pytest.mark.slow
def test_processes_of_mpirun_find_each_other(job: Any, tmp_path: Path) -> None:
    meeting = {
        "ACCELERATE_USE_CPU": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PMI_SIZE": "2",
    }
    program = [sys.executable, str(Path(__file__).with_name("several.py")), json.dumps(job(tmp_path / "run"))]
    both = [
        subprocess.Popen(program, env=environment(tmp_path) | meeting | {"PMI_RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    ends = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["finished"]
    one = do(1, tmp_path, job(tmp_path / "alone"))
    assert one.returncode == 0, one.stderr
    for a, b in zip(lines(tmp_path / "run", "train"), lines(tmp_path / "alone", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=LOSS_TOLERANCE)
