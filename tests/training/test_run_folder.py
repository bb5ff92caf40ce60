"""The run folder: nothing of a user's is lost, whatever fails and whenever."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.errors import RunFolderError, ShapeError, TrainingError
from lorakit.formats import read_adapter
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.prepare import check_space
from lorakit.training.run_files import read_spec, read_summary
from lorakit.training.run_folder import REPLACED, RunFolder
from lorakit.training.spec import TaskSpec

Fit = Callable[..., FitResult]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished_run(quick_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    quick_fit(max_steps=2, output=out)
    return out


@pytest.fixture
def old(finished_run: Path, tmp_path: Path) -> Path:
    """Return a finished run of one's own, alone in its parent."""
    return shutil.copytree(finished_run, tmp_path / "run")


class Breaks(Observer):
    """Breaks off in the first step, or as soon as a stage begins."""

    def __init__(self, stage: str | None = None) -> None:
        self.broken_stage = stage

    def stage(self, text: str) -> None:
        if self.broken_stage is not None and text.startswith(self.broken_stage):
            raise KeyboardInterrupt

    def step(self, step: Step) -> None:
        if self.broken_stage is None:
            raise TrainingError("the power went out")


BROKEN = (KeyboardInterrupt, TrainingError)


def test_an_existing_folder_is_refused(old: Path) -> None:
    with pytest.raises(RunFolderError, match="exists already"):
        RunFolder(old)


def test_force_replaces_a_run_whole_and_leaves_nothing_beside_it(quick_fit: Fit, old: Path) -> None:
    (old / "chat_template.jinja").write_text("of the old run")
    quick_fit(max_steps=3, output=old, force=True)
    assert read_summary(old).num_steps == 3
    assert not (old / "chat_template.jinja").exists()
    assert [entry.name for entry in old.parent.iterdir()] == ["run"]


def test_force_does_not_replace_a_folder_of_the_users_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="is not a run folder, so even --force does not replace it"):
        RunFolder(tmp_path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_and_a_link_are_refused(old: Path, force: bool) -> None:
    file, link = old.parent / "file", old.parent / "link"
    file.write_text("mine")
    link.symlink_to(old)
    for place in (file, link):
        with pytest.raises(RunFolderError, match="is a file or a link"):
            RunFolder(place, force)


def test_a_place_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match=r"cannot be made: '.*file' is a file"):
        RunFolder(tmp_path / "file" / "deep" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="may not be written to"):
        RunFolder(tmp_path / "run")


def test_an_empty_folder_is_filled(quick_fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    quick_fit(max_steps=1, output=tmp_path / "run")
    assert read_summary(tmp_path / "run").num_steps == 1


def test_what_came_into_the_folder_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("another run's")
    with pytest.raises(RunFolderError, match="exists already"):
        folder.begin({})
    folder.end()
    assert (tmp_path / "run" / "config.yaml").read_text() == "another run's"


@pytest.mark.parametrize("stage", [None, "loading", "attaching", "measuring the base", "training"])
def test_a_replaced_run_comes_back_if_the_new_one_fails(quick_fit: Fit, old: Path, stage: str | None) -> None:
    before = contents(old)
    with pytest.raises(BROKEN):
        quick_fit(output=old, force=True, observer=Breaks(stage))
    assert contents(old) == before
    assert [entry.name for entry in old.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("stage", [None, "loading", "measuring the base", "training"])
def test_a_run_that_fails_before_saving_leaves_nothing(quick_fit: Fit, tmp_path: Path, stage: str | None) -> None:
    with pytest.raises(BROKEN):
        quick_fit(output=tmp_path / "run", observer=Breaks(stage))
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_run_is_let_go_with_the_first_checkpoint(quick_fit: Fit, old: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick_fit(output=old, force=True, observer=Breaks("saving"))
    assert not (old / REPLACED).exists()
    assert not (old / "adapter_config.json").exists()
    assert (old / "checkpoints" / "step-000012").is_dir()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_set_aside_by_a_killed_process_comes_back(old: Path, parts: int) -> None:
    before = contents(old)
    aside = old.parent / ".run.new-abc"
    aside.mkdir()
    old.rename(aside / REPLACED)  # killed between the two renames of begin
    if parts == 2:
        (aside / "config.yaml").write_text("rank: 2")
    RunFolder(old, force=True)
    assert contents(old) == before
    assert [entry.name for entry in old.parent.iterdir()] == ["run"]


def test_a_folder_has_one_training_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin({"rank": 2})
    with pytest.raises(RunFolderError, match="another process is training"):
        RunFolder.to_go_on(tmp_path / "run")
    folder.end()


def test_an_unfinished_run_is_whole_after_a_new_one_is_refused(quick_fit: Fit, old: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        (old / name).unlink()
    before = contents(old)
    with pytest.raises(ShapeError):
        quick_fit(output=old, force=True, rank=1000)
    assert contents(old) == before


def test_a_run_that_breaks_off_after_saving_keeps_its_adapter_alone(quick_fit: Fit, old: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick_fit(output=old, force=True, observer=Breaks("proving"))
    assert read_adapter(old).sites
    assert not (old / "run.json").exists()
    assert not (old / REPLACED).exists()
    assert [entry.name for entry in old.parent.iterdir()] == ["run"]


def test_a_users_file_that_came_during_the_run_stays(quick_fit: Fit, tmp_path: Path) -> None:
    class WritesThere(Breaks):
        def step(self, step: Step) -> None:
            (tmp_path / "run" / "notes.txt").write_text("mine")
            super().step(step)

    with pytest.raises(TrainingError):
        quick_fit(output=tmp_path / "run", observer=WritesThere())
    assert contents(tmp_path) == {"run/notes.txt": b"mine"}


def fill_disk(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """Let renaming into these folders fail as it does where the disk has no room left."""
    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        if any(Path(target).is_relative_to(place) for place in places):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)


class FillsDisk(Observer):
    """Fills the disk while the run trains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
        self.monkeypatch, self.places = monkeypatch, places

    def training_ends(self) -> None:
        fill_disk(self.monkeypatch, *self.places)


def test_a_full_disk_names_the_place_and_rescues_the_adapter(
    quick_fit: Fit, rows_of: Any, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rescue = tmp_path / "elsewhere"
    rescue.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rescue))
    with pytest.raises(TrainingError, match="the disk is full") as caught:
        quick_fit(output=old, force=True, observer=FillsDisk(monkeypatch, old))
    (saved,) = rescue.iterdir()
    assert str(old) in str(caught.value)
    assert f"saved whole in '{saved}'" in str(caught.value)
    assert read_adapter(saved).sites
    monkeypatch.undo()
    assert resume(old, rows=rows_of("classified")).summary.finished


def test_where_nothing_can_be_rescued_the_error_is_that_of_the_place(
    quick_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rescue = tmp_path / "elsewhere"
    rescue.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(rescue))
    with pytest.raises(TrainingError, match="the disk is full") as caught:
        quick_fit(output=tmp_path / "run", observer=FillsDisk(monkeypatch, tmp_path))
    assert str(tmp_path / "run") in str(caught.value)
    assert "saved whole" not in str(caught.value)
    assert list(rescue.iterdir()) == []


def test_a_full_disk_at_the_start_brings_the_old_run_back(
    quick_fit: Fit, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    fill_disk(monkeypatch, old.parent)
    with pytest.raises(TrainingError, match=r"the disk is full: '.*config\.yaml'"):
        quick_fit(output=old, force=True)
    assert contents(old) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_metrics_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin({})
    assert folder._log is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, folder._log.fileno())
    os.close(full)
    with pytest.raises(TrainingError, match=r"the disk is full: metrics could not be added in '.*run'"):
        folder.log({"loss": 1.0})
    folder.end()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_little_room_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10 * 2**20))
    with pytest.raises(TrainingError, match="only 10 MiB are free at"):
        check_space(str(tmp_path / "not" / "yet" / "there"))


def test_a_run_that_is_not_saved_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    check_space(None)


def test_the_task_comes_back_as_it_was(old: Path) -> None:
    assert read_spec(old) == TaskSpec(
        "classification", ("blue", "green", "red"), max_length=64, separator="", layout="text-label"
    )


@pytest.mark.parametrize("read", [read_summary, read_spec])
@pytest.mark.parametrize("text", [None, "{", "[]", '"text"', "{}"])
def test_a_missing_or_broken_file_is_a_run_folder_error(tmp_path: Path, read: Any, text: str | None) -> None:
    for name in ("run.json", "task.json"):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(RunFolderError, match=r"(run|task)\.json"):
        read(tmp_path)


def test_a_rescued_adapter_is_the_trained_one(quick_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rescue = tmp_path / "elsewhere"
    rescue.mkdir()
    expected = quick_fit(seed=5).handle.state()
    monkeypatch.setattr(tempfile, "tempdir", str(rescue))
    with pytest.raises(TrainingError):
        quick_fit(seed=5, output=tmp_path / "run", observer=FillsDisk(monkeypatch, tmp_path / "run"))
    state = read_adapter(next(rescue.iterdir()))
    for path, site in expected.sites.items():
        assert all(torch.equal(state.sites[path].tensors[name], tensor) for name, tensor in site.tensors.items())


def test_a_killed_run_that_replaces_another_keeps_it_until_there_is_something_to_show(old: Path) -> None:
    before = contents(old)
    killed = RunFolder(old, force=True)
    killed.begin({"rank": 2})
    assert killed._lock is not None
    assert killed._log is not None
    os.close(killed._lock)  # as the end of its process does
    killed._log.close()
    assert contents(old / REPLACED) == before

    again = RunFolder.to_go_on(old)
    again.go_on(0)
    assert contents(old / REPLACED) == before
    again.is_saved()
    assert not (old / REPLACED).exists()
    again.end()
