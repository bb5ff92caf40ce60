"""From flags and a config file to one checked value."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.cli.train import default_output, flags, read_settings
from lorakit.errors import ConfigError


def written(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_file_says_all_that_flags_can(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d.jsonl\nrank: 4\ntargets: [q_proj]\noutput: there\nlayers: last:2\n")
    model, data, settings = read_settings(file, {})
    assert (model, data, settings.rank, settings.targets, settings.output) == ("m", "d.jsonl", 4, ["q_proj"], "there")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\nrank: 4\nlr: 0.1\n")
    model, _, settings = read_settings(file, {"rank": 2, "model": "other"})
    assert (model, settings.rank, settings.lr) == ("other", 2, 0.1)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\nrnak: 4\nepoch: 2\nlr: -1\nmethod: lroa\nvalidation: 2\n")
    with pytest.raises(ConfigError) as caught:
        read_settings(file, {"batch_size": 0})
    message = str(caught.value)
    assert message.startswith(f"config file '{file}' and flags: 7 problems:")
    for hint in (
        "'rnak'. Closest: 'rank'",
        "'epoch'. Closest: 'epochs'",
        "lr: ",
        "Closest: 'lora'",
        "'data' is missing",
    ):
        assert hint in message
    assert "batch_size: " in message
    assert "validation: give a share of the rows between 0 and 1, or a file" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [("- a\n", "needs 'key: value' lines"), ("a: [\n", "is not YAML"), (None, "cannot be read")],
    ids=["list", "broken", "missing"],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    file = str(tmp_path / "none.yaml") if text is None else written(tmp_path, text)
    with pytest.raises(ConfigError, match=problem):
        read_settings(file, {})


@pytest.mark.parametrize(("given", "read"), [("0.2", 0.2), ("held.jsonl", "held.jsonl")])
def test_validation_is_a_share_or_a_file(given: str, read: float | str) -> None:
    assert flags({"validation": given}) == {"validation": read}


def test_flags_that_were_not_given_say_nothing() -> None:
    assert flags({"rank": None, "output_": "o", "as_json": True, "config": "c", "train_modules": "a, b"}) == {
        "output": "o",
        "train_modules": ["a", "b"],
    }


def test_the_default_output_is_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_output("org/some model", "rows/train.jsonl") == "runs/some-model-train"
    Path("runs/some-model-train").mkdir(parents=True)
    Path("runs/some-model-train-2").touch()
    assert default_output("org/some model", "rows/train.jsonl") == "runs/some-model-train-3"
