"""Resuming: a run that was killed, anywhere, ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lorakit.errors import InputError, RunFolderError, TrainingError
from lorakit.training.checkpoint import Checkpoints, read_progress
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.runs import open_run

Fit = Callable[..., FitResult]
Rows = Callable[..., list[dict[str, Any]]]
Bases = Callable[[str], Path]

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 14
# What a clock says may differ; nothing else.
TIMED = ("seconds", "tokens_per_s")
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "classified", {"save_every": 1, "eval_every": 4}),
    "llama, dropout": (
        "llama",
        "prompted",
        {"method": {"name": "lora", "rank": 4, "dropout": 0.2}, "eval_every": 3, "micro_batch": 3, "save_every": 2},
    ),
}


Killed = tuple[Path, Path, list[int]]


def written(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def settings_of(case: str, output: Path, **more: Any) -> dict[str, Any]:
    fixed = {"max_steps": STEPS, "lr": 1e-2, "batch_size": 8, "validation": 0.2, "seed": 3}
    return {**fixed, **CASES[case][2], **more, "output": str(output)}


def run_jobs(jobs: Sequence[dict[str, Any]], home: Path) -> dict[str, list[int]]:
    """Do the jobs of ``killed_runs.py``; return the exit codes of each run's attempts."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py"))],
        input=json.dumps(list(jobs)),
        env=environment | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        found = json.loads(line)
        codes.setdefault(found["output"], []).append(found["code"])
    assert all(code != 1 for each in codes.values() for code in each), done.stderr
    return codes


def told(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics without times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    notes = [note for note in found["notes"] if not note.startswith("Resumed after step")]
    return {key: value for key, value in found.items() if key not in TIMED} | {"notes": notes}


@pytest.fixture(scope="module")
def all_killed(bases: Bases, rows_of: Rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    """Return, for each case, an undisturbed run, one killed at three random steps and in three writings."""
    place = tmp_path_factory.mktemp("killed")
    jobs: list[dict[str, Any]] = []
    for case, (kind, layout, _) in CASES.items():
        data = written(place / f"{kind}.jsonl", rows_of(layout))
        chance = random.Random(f"{case}/1")
        steps = sorted(chance.sample(range(1, STEPS + 1), 3))
        kills = [{"step": steps[0]}, {"write": chance.randrange(1, 40)}, {"step": steps[1]}]
        kills += [{"write": chance.randrange(1, 40)}, {"step": steps[2]}, {"write": chance.randrange(1, 20)}]
        for name, each in (("whole", []), ("killed", kills)):
            settings = settings_of(case, place / f"{kind}-{name}")
            jobs.append({"model": str(bases(kind)), "data": str(data), "settings": settings, "kills": each})
    codes = run_jobs(jobs, place)
    folders = {case: (place / f"{kind}-whole", place / f"{kind}-killed") for case, (kind, _, _) in CASES.items()}
    return {case: (*both, codes[str(both[1])]) for case, both in folders.items()}


@pytest.fixture(params=CASES)
def killed(request: pytest.FixtureRequest, all_killed: dict[str, Killed]) -> Killed:
    """Return an undisturbed run's folder, a killed one's, and the exit codes of its attempts."""
    return all_killed[request.param]


def test_the_kills_have_really_happened(killed: Killed) -> None:
    assert killed[2][:3].count(-signal.SIGKILL) >= 2
    assert killed[2].count(-signal.SIGKILL) >= 4
    assert killed[2][-1] == 0


def test_a_killed_run_has_every_line_of_metrics_of_an_undisturbed_one(killed: Killed) -> None:
    assert told(killed[1]) == told(killed[0])


def test_a_killed_run_ends_with_the_same_adapter_byte_for_byte(killed: Killed) -> None:
    whole, resumed = ((folder / "adapter_model.safetensors").read_bytes() for folder in killed[:2])
    assert resumed == whole


def test_a_killed_run_reports_what_an_undisturbed_one_does(killed: Killed) -> None:
    assert summary(killed[1]) == summary(killed[0])


def test_nothing_of_killed_writers_is_left(killed: Killed) -> None:
    left, expected = (sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (killed[1], killed[0]))
    assert left == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_every_write_of_a_checkpoint_is_the_same(
    case: str, bases: Bases, rows_of: Rows, tmp_path: Path
) -> None:
    kind, layout, _ = CASES[case]
    data = written(tmp_path / "rows.jsonl", rows_of(layout))
    jobs = []
    for number in range(0, 60, 3):
        more = settings_of(case, tmp_path / str(number), max_steps=5, save_every=1, eval_every=2)
        kills = [{"write": number}, {"write": number // 2 + 1}] if number else []
        jobs.append({"model": str(bases(kind)), "data": str(data), "settings": more, "kills": kills})
    run_jobs(jobs, tmp_path)
    expected = told(tmp_path / "0"), (tmp_path / "0" / "adapter_model.safetensors").read_bytes()
    for number in range(3, 60, 3):
        folder = tmp_path / str(number)
        assert (told(folder), (folder / "adapter_model.safetensors").read_bytes()) == expected


class Breaks(Observer):
    """Ends the run at a step, as a bug or a lost connection would."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.notes: list[str] = []
        self.resumed: list[int] = []

    def step(self, step: Step) -> None:
        if step.step == self.at:
            raise TrainingError("the power went out")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def resumes(self, step: int, num_steps: int) -> None:
        self.resumed.append(step)


@pytest.fixture(scope="module")
def source(rows_of: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of rows; copy it before changing it."""
    return written(tmp_path_factory.mktemp("source") / "rows.jsonl", rows_of("classified"))


@pytest.fixture(scope="module")
def broken_off(quick_fit: Fit, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with whole checkpoints of steps 3 (the best), 5 and 6, broken off in step 7; copy it."""
    place = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(TrainingError, match="power"):
        quick_fit("bert", str(source), output=place, observer=Breaks(7), save_every=1, keep=2, eval_every=3)
    return place


@pytest.fixture
def run(broken_off: Path, tmp_path: Path) -> Path:
    """Return a broken-off run of one's own."""
    return shutil.copytree(broken_off, tmp_path / "run")


def test_a_run_that_broke_off_keeps_its_last_checkpoints_and_the_best(run: Path) -> None:
    progress = read_progress(run)
    assert progress is not None
    assert (progress.step, progress.best_step) == (6, 6)
    # That of step 3 is the best that the one of step 5 knows.
    assert Checkpoints(run).names() == ["step-000006", "step-000005", "step-000003"]


def test_a_checkpoint_is_a_folder_that_predicts(run: Path) -> None:
    opened = open_run(run / "checkpoints" / "step-000006")
    assert opened.predict(["the red house"])[0].label in opened.spec.labels


def test_a_run_without_an_adapter_yet_says_how_to_use_it(run: Path) -> None:
    with pytest.raises(RunFolderError) as caught:
        open_run(run)
    assert f"Go on with it: lorakit resume {run}, or use '{run}/checkpoints/step-000006' as it is." in str(caught.value)


def test_going_on_says_where_and_drops_later_lines(run: Path) -> None:
    watch = Breaks(0)
    resume(run, observer=watch)
    steps = [line["step"] for line in told(run) if line["kind"] == "train"]
    assert watch.resumed == [6]
    assert steps == list(range(1, 13))


def test_a_finished_run_is_not_gone_on_with(run: Path) -> None:
    resume(run)
    with pytest.raises(RunFolderError, match="come to its end after 12 steps"):
        resume(run)


def damage_cut(folder: Path) -> None:
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def damage_bit(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_state(folder: Path) -> None:
    (folder / "state.json").write_text((folder / "state.json").read_text()[:40])


def damage_missing(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_lost(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "its state.safetensors is not what was written"),
        (damage_bit, "its adapter_model.safetensors is not what was written"),
        (damage_state, "its state.json cannot be read"),
        (damage_missing, "it has no state.json"),
        (damage_lost, "it lacks adapter_config.json"),
    ],
    ids=lambda value: value.__name__.removeprefix("damage_") if callable(value) else "",
)
def test_a_half_written_checkpoint_is_passed_over_for_the_one_before(
    run: Path, broken_off: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(run / "checkpoints" / "step-000006")
    watch = Breaks(0)
    resume(run, observer=watch)
    assert watch.resumed == [5]
    assert any(f"'step-000006' is passed over: {reason}" in note for note in watch.notes)


def test_a_checkpoint_whose_best_is_lost_is_passed_over(run: Path) -> None:
    for step in (6, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    watch = Breaks(0)
    assert resume(run, observer=watch).summary.num_steps == 12
    assert any("'step-000005' is passed over" in note for note in watch.notes)


def test_without_a_whole_checkpoint_the_run_starts_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    watch = Breaks(0)
    result = resume(run, observer=watch)
    assert "There is no whole checkpoint: the run starts again from its first step." in watch.notes
    assert [line["step"] for line in told(run) if line["kind"] == "train"] == list(range(1, 13))
    assert result.summary.num_steps == 12


def change_config(run: Path, **changes: Any) -> None:
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


def test_settings_that_were_changed_since_are_named(run: Path) -> None:
    change_config(run, lr=0.1, clip_norm=2.0)
    with pytest.raises(RunFolderError, match=r"(?s)2 problems.*clip_norm was 1.0 and is 2.0.*lr was 0.005 and is 0.1"):
        resume(run)


def test_settings_that_change_no_number_may_change(run: Path) -> None:
    change_config(run, keep=5, save_every=4)
    assert resume(run).summary.finished


def test_rows_that_were_changed_since_are_refused(run: Path, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    lines = source.read_text().splitlines()
    lines[0] = lines[0].replace('"text": "', '"text": "very ')
    other.write_text("\n".join(lines))
    change_config(run, data=str(other))
    with pytest.raises(RunFolderError, match="the rows are others: the file of examples"):
        resume(run)


def test_rows_that_have_moved_are_told_of_and_can_be_given(run: Path, source: Path, tmp_path: Path) -> None:
    moved = shutil.copy(source, tmp_path / "moved.jsonl")
    change_config(run, data=str(tmp_path / "gone.jsonl"))
    with pytest.raises(InputError, match=r"cannot go on: there is no file '.*gone\.jsonl'"):
        resume(run)
    assert resume(run, rows=moved).summary.finished


def test_another_base_is_refused(run: Path, bases: Bases, tmp_path: Path) -> None:
    folder = shutil.copytree(bases("bert"), tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "word_embeddings" in key)
    weights[name] = weights[name] + 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change_config(run, model=str(folder))
    with pytest.raises(RunFolderError, match="the base is another one"):
        resume(run)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "thing")
    with pytest.raises(RunFolderError, match=r"no config\.yaml|there is no run folder"):
        resume(tmp_path / "thing")


def test_refusing_changes_nothing(run: Path) -> None:
    change_config(run, lr=0.1)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError):
        resume(run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_of_objects_goes_on_with_them(build: Any, tokenizer: Any, rows_of: Rows, tmp_path: Path) -> None:
    from lorakit.training.fit import fit

    rows, words = rows_of("classified"), tokenizer("bert")
    settings = {"tokenizer": words, "max_steps": 8, "lr": 1e-2, "save_every": 2}
    whole = fit(build("bert"), rows, **settings)
    with pytest.raises(TrainingError):
        fit(build("bert"), rows, output=tmp_path / "run", observer=Breaks(6), **settings)
    with pytest.raises(InputError, match="model and rows given as objects"):
        resume(tmp_path / "run")
    again = resume(tmp_path / "run", model=build("bert"), rows=rows, tokenizer=words)
    pairs = zip(whole.handle.parameters().values(), again.handle.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class FillsDisk(Observer):
    """Lets no file be put in place in a folder from a step on, as where the disk has no room left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Path, at: int) -> None:
        self.monkeypatch, self.place, self.at = monkeypatch, place, at

    def step(self, step: Step) -> None:
        if step.step != self.at:
            return
        replace = os.replace

        def refused(source: Any, target: Any) -> None:
            if Path(target).is_relative_to(self.place):
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            replace(source, target)

        self.monkeypatch.setattr(os, "replace", refused)


@pytest.mark.parametrize("at", [1, 5])
def test_a_full_disk_loses_nothing_and_the_run_goes_on_once_there_is_room(
    quick_fit: Fit, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole = quick_fit("bert", str(source))
    place = tmp_path / "run"
    filler = FillsDisk(monkeypatch, place / "checkpoints", at)
    with pytest.raises(TrainingError) as caught:
        quick_fit("bert", str(source), output=place, observer=filler, save_every=2)
    monkeypatch.undo()
    message = str(caught.value)
    assert f"the disk is full: the checkpoint of step {at + at % 2} could not be written" in message
    assert f"adapter so far was saved whole in '{place}'" in message
    assert f"go on with: lorakit resume {place}" in message
    assert open_run(place).spec.labels
    left = sorted(p.name for p in (place / "checkpoints").iterdir())
    assert left == (["step-000002", "step-000004"] if at == 5 else [])
    again = resume(place)
    pairs = zip(whole.handle.parameters().values(), again.handle.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class PressesTwice(Observer):
    """Presses Ctrl-C twice in a step, so that no time is left."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: Step) -> None:
        if step.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [1, 5])
def test_a_second_ctrl_c_loses_nothing(quick_fit: Fit, source: Path, tmp_path: Path, at: int) -> None:
    whole = quick_fit("bert", str(source))
    with pytest.raises(KeyboardInterrupt):
        quick_fit("bert", str(source), output=tmp_path / "run", observer=PressesTwice(at))
    progress = read_progress(tmp_path / "run")
    assert progress is not None
    assert progress.step == at
    again = resume(tmp_path / "run")
    pairs = zip(whole.handle.parameters().values(), again.handle.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "lr": 0.5},
        {"optimizer": "adafactor", "lr": 0.1, "schedule": "cosine"},
        {"method": "dora"},
        {"dtype": "fp16"},
        {"dtype": "bf16", "schedule": "constant"},
        {"weight_decay": 0.1, "warmup": 3},
        {"grad_checkpointing": True},
        {"train_modules": "LayerNorm", "micro_batch": 3},
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_exactly(
    quick_fit: Fit, source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = quick_fit("bert", str(source), max_steps=7, **settings)
    with pytest.raises(TrainingError):
        quick_fit(
            "bert", str(source), max_steps=7, output=tmp_path / "run", observer=Breaks(5), save_every=2, **settings
        )
    again = resume(tmp_path / "run")
    pairs = zip(whole.handle.parameters().values(), again.handle.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
