"""Train, measure, use and merge with the real command, in processes of its own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorakit.adapters import attach
from lorakit.bases import load_base
from lorakit.formats.store import save_adapter
from lorakit.methods.lora import LoRA

from .conftest import Command, Done, finish, quick

MARKS_OF_NOISE = ("Warning", "it/s", "Traceback", "[transformers]")


@pytest.fixture(scope="session")
def trained(place: Path, lorakit: Command) -> Done:
    """Return what training prints in words, with the default output."""
    done = lorakit("train", "encoder", "opinions.jsonl", "--max-steps", "12", "--lr", "0.01", cwd=place)
    assert done.code == 0, done.stderr
    return done


def test_training_prints_choices_results_and_what_to_do_next(trained: Done, place: Path) -> None:
    for part in ("Settings", "as asked", "Before and after", "Proof", "Samples", "linear probe"):
        assert part in trained.stdout
    assert "lorakit predict runs/encoder-opinions --text" in trained.stdout
    assert (place / "runs/encoder-opinions/report.html").stat().st_size > 10_000


def test_training_shows_its_progress_on_stderr_without_noise(trained: Done) -> None:
    assert "step 12 of 12  loss" in trained.stderr
    assert "validation loss" in trained.stderr
    assert [mark for mark in MARKS_OF_NOISE if mark in trained.stderr] == []


def test_training_with_json_prints_one_object(place: Path, lorakit: Command) -> None:
    done = lorakit("train", "decoder", "texts.jsonl", "--json", "--epochs", 1, "--output", "modeling", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["task"] == "language-modeling"
    assert done.json["run"] == "modeling"
    assert Path(place, done.json["report"]).is_file()
    assert done.json["proof"]["base_unchanged"] is True
    assert done.json == json.loads((place / "modeling/run.json").read_text()) | {
        "run": "modeling",
        "report": done.json["report"],
    }


def test_quiet_training_prints_the_result_on_one_line_and_the_run_folder(place: Path) -> None:
    done = quick("train", place / "encoder", place / "opinions.jsonl", "-q", "--max-steps", 2, "-o", place / "quiet")
    assert (done.code, done.stdout.strip()) == (0, str(place / "quiet"))
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"accuracy: \S+ % before, \S+ % after 2 steps in \S+ s", line)


def test_a_run_trains_again_from_its_own_config(classifier: Path, tmp_path: Path) -> None:
    done = quick("train", "--config", classifier / "config.yaml", "-o", tmp_path / "again", "--json")
    assert done.code == 0, done.stderr
    before = json.loads((classifier / "run.json").read_text())
    assert done.json["after"]["loss"] == pytest.approx(before["after"]["loss"], rel=1e-4)  # sums in another order


def test_eval_measures_a_classifier(classifier: Path, place: Path, lorakit: Command) -> None:
    done = lorakit("eval", "classifier", "test.jsonl", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["accuracy"] >= 0.9
    assert {entry["label"] for entry in done.json["classes"]} == {"positive", "negative"}
    assert done.json.keys() >= {"loss", "perplexity", "macro_f1", "notes"}
    assert "accuracy" in quick("eval", classifier, place / "test.jsonl").stdout


def test_eval_measures_a_writer_and_counts_rows_left_out(writer: Path, place: Path, tmp_path: Path) -> None:
    row = {"prompt": "what is " * 40, "completion": " my cat"}
    long = tmp_path / "long.jsonl"
    long.write_text((place / "answers.jsonl").read_text() + json.dumps(row) + "\n")
    done = quick("eval", writer, long, "--json")
    assert done.code == 0, done.stderr
    assert done.json["perplexity"] > 1
    assert done.json["notes"][0].startswith("1 of ")
    assert "1 of " in quick("eval", writer, long).stderr


def test_predict_labels_a_file_whose_rows_have_labels_or_not(classifier: Path, place: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.csv"
    bare.write_text("text\nthe movie was good\na bad film\n")
    for file, count in ((place / "test.jsonl", 20), (bare, 2)):
        done = quick("predict", classifier, file, "--json")
        assert done.code == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == count
        assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5) for line in lines)
        assert all(line["label"] == next(iter(line["probabilities"])) for line in lines)


def test_predict_reads_lines_from_stdin(
    classifier: Path, place: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("predict", "classifier", "-", "--json", cwd=place)
    assert process.stdin is not None
    texts = [json.loads(line)["text"] for line in (place / "test.jsonl").read_text().splitlines()]
    process.stdin.write("\n\n".join(texts))
    done = finish(process)
    assert done.code == 0, done.stderr
    expected = quick("predict", classifier, place / "test.jsonl", "--json").stdout
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == [
        json.loads(line)["label"] for line in expected.splitlines()
    ]


def test_predict_says_which_texts_it_cut(classifier: Path) -> None:
    done = quick("predict", classifier, "--text", "good", "--text", "bad " * 50)
    assert "note: 1 of 2 texts were cut to 32 tokens: 2" in done.stderr


def test_generate_writes_and_repeats_with_a_seed(writer: Path, place: Path, lorakit: Command) -> None:
    arguments = ("generate", "writer", "what is cat", "--max-new-tokens", 6, "--temperature", 1, "--seed", 3)
    written = lorakit(*arguments, cwd=place)
    assert written.code == 0, written.stderr
    again = quick("generate", writer, *arguments[2:], "--base", place / "decoder", "--json")
    assert again.json["text"] == written.stdout.removesuffix("\n")


def test_merge_writes_a_model_that_transformers_loads(writer: Path, place: Path, lorakit: Command) -> None:
    done = lorakit("merge", "writer", "merged", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["max_difference"] <= done.json["tolerance"]
    assert done.json["reloaded"] is True
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "merged")
    assert model.config.model_type == "llama"


def test_merge_says_in_words_what_rounding_does(writer: Path, place: Path, tmp_path: Path) -> None:
    done = quick("merge", writer, tmp_path / "half", "--dtype", "bf16", "--base", place / "decoder")
    assert done.code == 0, done.stderr
    assert "Stored as bf16: rounding moves the outputs by" in done.stdout
    assert "Loaded again, the folder gives the same outputs." in done.stdout


def test_inspect_shows_a_models_layers_from_its_header(place: Path) -> None:
    done = quick("inspect", place / "decoder", "--json")
    weights = load_file(place / "decoder" / "model.safetensors")
    assert done.json["num_params"] == sum(tensor.numel() for tensor in weights.values())
    assert "q_proj" in done.json["target_names"]
    group = next(group for group in done.json["groups"] if "q_proj" in group["pattern"])
    assert (group["d_in"], group["d_out"], group["count"]) == (16, 16, 2)
    assert "model.layers.{0..1}.self_attn.q_proj" in quick("inspect", place / "decoder").stdout


def test_inspect_shows_what_an_adapter_learned(classifier: Path) -> None:
    done = quick("inspect", classifier, "--json")
    assert done.json["method"]["name"] == "lora"
    assert done.json["num_bytes"] == (classifier / "adapter_model.safetensors").stat().st_size
    assert all(1 <= layer["effective_rank"] <= layer["rank"] for layer in done.json["layers"])
    assert "classifier (in full)" in quick("inspect", classifier).stdout


@pytest.mark.parametrize("kind", ["classifier", "writer"])
def test_the_identity_of_a_model_is_the_one_its_runs_name(
    kind: str, place: Path, request: pytest.FixtureRequest
) -> None:
    run = quick("inspect", request.getfixturevalue(kind), "--json").json
    model = "encoder" if kind == "classifier" else "decoder"
    assert quick("inspect", place / model, "--identity", "--json").json["identity"] == run["identity"]


def test_a_bare_peft_folder_works_with_its_base(place: Path, tmp_path: Path) -> None:
    base = load_base(place / "decoder", "generation")
    handle = attach(base.model, LoRA(rank=2), "q_proj", seed=0)
    save_adapter(handle, tmp_path / "bare", task_type="CAUSAL_LM")
    refused = quick("generate", tmp_path / "bare", "what is")
    assert (refused.code, "--base MODEL" in refused.message) == (2, True)
    arguments = ("generate", tmp_path / "bare", "what is", "--base", place / "decoder", "--max-new-tokens", 3)
    assert quick(*arguments).code == 0
