"""Bad input: exit code 2, one message that says what to do, no traceback, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Command, Done, opinions, quick, write_rows


def refused(done: Done) -> str:
    """Return the message of a command that refused the user's input."""
    assert done.code == 2, (done.code, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("lorakit: ") == 1
    return done.message


Write = Callable[[Path], Path]


def empty(folder: Path) -> Path:
    (folder / "empty.jsonl").touch()
    return folder / "empty.jsonl"


def without_label(folder: Path) -> Path:
    rows = opinions(10)
    del rows[4]["label"]
    return write_rows(folder / "rows.jsonl", rows)


def one_class(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", [row | {"label": "same"} for row in opinions(10)])


def typo(folder: Path) -> Path:
    write_rows(folder / "opinions.jsonl", opinions(4))
    return folder / "opinons.jsonl"


BAD_ROWS = {
    "missing file": (typo, "opinons.jsonl'. Closest: 'opinions.jsonl'"),
    "empty file": (empty, "is empty (0 bytes)"),
    "row without the field": (without_label, "line 5: no 'label'"),
    "one class": (one_class, "every 'label' is 'same'. At least two classes are needed."),
}


@pytest.mark.parametrize(("write", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_refused(place: Path, tmp_path: Path, write: Write, message: str) -> None:
    done = quick("train", place / "encoder", write(tmp_path), "-o", tmp_path / "run")
    assert message in refused(done)
    assert not (tmp_path / "run").exists()


BAD_SETTINGS = {
    "rank above a layer": (["--rank", 64], "rank 64 is above the smaller side of "),
    "unknown targets": (["--targets", "qery,valu"], "'qery'. Closest: 'query'"),
    "unknown method": (["--method", "lroa"], "no method 'lroa'. Closest: 'lora'"),
    "unknown task": (["--task", "sorting"], "task: "),
    "length above the context": (["--max-length", 4096], "above the model's context of 32 tokens"),
    "unknown device": (["--device", "cudda"], "unknown device 'cudda'"),
    "several": (["--rank", 0, "--lr", -1], "2 problems"),
}


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_are_refused(place: Path, tmp_path: Path, options: list[object], message: str) -> None:
    done = quick("train", place / "encoder", place / "opinions.jsonl", "-o", tmp_path / "run", *options)
    assert message in refused(done)
    assert not (tmp_path / "run").exists()


def test_weights_with_nan_are_refused(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (place / "encoder").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    message = refused(quick("train", broken, place / "opinions.jsonl", "-o", tmp_path / "run"))
    assert "'bert.encoder.layer.0.output.dense.weight'" in message


def test_prompts_longer_than_the_context_are_counted(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"what {word} " * 40, "completion": " cat"} for word in ("is", "was", "a", "the")]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    message = refused(quick("train", place / "decoder", file, "-o", tmp_path / "run"))
    assert "the prompt alone fills the 32 tokens (line" in message


def test_a_prompt_longer_than_the_context_is_counted(writer: Path) -> None:
    message = refused(quick("generate", writer, "what is " * 40))
    assert "prompt 1 has 80 tokens" in message


def test_rows_whose_labels_are_all_masked_are_refused(place: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "cat"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    template = "{% for m in messages %}{{ m.content if m.role == 'user' }} {% endfor %}"
    model = tmp_path / "model"
    model.mkdir()
    for file in (place / "decoder").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(template)
    refused(quick("train", model, rows, "-o", tmp_path / "run"))


def test_an_adapter_of_another_base_is_refused(classifier: Path, place: Path) -> None:
    message = refused(quick("eval", classifier, place / "test.jsonl", "--base", place / "decoder"))
    assert f"belongs to the base '{place}/encoder'" in message


def test_a_run_folder_that_exists_is_kept(classifier: Path, place: Path) -> None:
    before = (classifier / "run.json").read_bytes()
    message = refused(quick("train", place / "encoder", place / "opinions.jsonl", "-o", classifier))
    assert "--force" in message
    assert (classifier / "run.json").read_bytes() == before


def test_force_does_not_replace_what_is_no_run(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    message = refused(quick("train", place / "encoder", place / "opinions.jsonl", "-o", tmp_path, "--force"))
    assert "is not a run folder" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "{bad}"], "unknown field 'rnak'. Closest: 'rank'"),
        (["train"], "'model' is missing"),
        (["eval", "{place}/clasifier", "{place}/test.jsonl"], "Closest: 'classifier'"),
        (["eval", "{place}/encoder", "{place}/test.jsonl"], "It is a model"),
        (["predict", "{place}/classifier"], "FILE"),
        (["predict", "{place}/classifier", "{place}/answers.jsonl"], "no column 'text'"),
        (["predict", "{place}/writer", "--text", "a"], "Use 'generate'"),
        (["generate", "{place}/classifier", "a"], "Use 'predict'"),
        (["generate", "{place}/writer", "cat", "--max-new-tokens", "0"], "at least 1"),
        (["merge", "{place}/writer", "{place}/encoder"], "exists already"),
        (["inspect", "{place}/decodr"], "Closest: 'decoder'"),
        (["inspect", "{place}"], "neither a model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(
    classifier: Path, writer: Path, place: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("rnak: 4\nepoch: 1\n")
    done = quick(*(argument.format(place=place, bad=bad) for argument in arguments))
    assert message in refused(done)


def test_a_refusal_with_json_leaves_stdout_empty(place: Path, tmp_path: Path, lorakit: Command) -> None:
    done = lorakit("train", place / "encoder", "none.jsonl", "--json", cwd=tmp_path)
    assert "there is no file 'none.jsonl'" in refused(done)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_to_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = refused(quick("train", place / "encoder", place / "opinions.jsonl", "-o", tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in message
