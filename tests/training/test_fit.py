"""Whole runs on tiny models: every task learns, what is promised is proven, and the folder is complete."""

from __future__ import annotations

import json
import os
import signal
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
from lorakit.adapters import handle_of
from lorakit.errors import TrainingError
from lorakit.records import Evaluation
from lorakit.reports.html import read_run
from lorakit.training.data.read import table_from_rows
from lorakit.training.fit import FitResult, fit
from lorakit.training.observe import Observer, Step
from lorakit.training.runs import open_run

Fit = Callable[..., FitResult]
Rows = Callable[..., list[dict[str, Any]]]

CASES = {
    "classification": ("bert", "classified"),
    "classification by GPT-2": ("gpt2", "classified"),
    "classification by T5": ("t5", "classified"),
    "prompts and completions": ("llama", "prompted"),
    "instructions": ("gpt2", "instructed"),
    "instructions to a chat model": ("llama-chat", "instructed"),
    "conversations": ("llama-chat", "talked"),
    "plain text": ("llama", "written"),
    "sequence to sequence": ("t5", "prompted"),
    "tied weights": ("llama-tied", "prompted"),
}
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoints",
    "config.yaml",
    "metrics.jsonl",
    "run.json",
    "start.json",
    "task.json",
}
# The same numbers in batches of other sizes: fp32 sums in another order.
SAME_LOSS = 1e-6


@dataclass(frozen=True)
class Finished:
    """A run with its folder, and the file of rows that it was validated on."""

    result: FitResult
    folder: Path
    held: Path


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def finished(
    request: pytest.FixtureRequest, quick_fit: Fit, rows_of: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Return a finished run of each task."""
    kind, rows = request.param
    place = tmp_path_factory.mktemp("finished")
    held = place / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows_of(rows, seed=5)), encoding="utf-8")
    result = quick_fit(kind, rows, validation=str(held), max_steps=30, lr=2e-2, output=place / "run")
    return Finished(result, place / "run", held)


def test_the_loss_falls(finished: Finished) -> None:
    summary = finished.result.summary
    assert summary.after.loss < summary.before.loss


def test_the_adapter_kept_is_the_best_that_was_measured(finished: Finished) -> None:
    summary = finished.result.summary
    lines = [line for line in read_run(finished.folder)[1] if line["kind"] == "eval"]
    best = max(lines, key=lambda line: (line["accuracy"] if summary.labels else 0.0, -line["loss"]))
    assert summary.after.loss == pytest.approx(best["loss"], abs=SAME_LOSS)


def test_the_base_is_proven_untouched_and_the_merge_exact(finished: Finished) -> None:
    proof = finished.result.summary.proof
    assert proof is not None
    assert proof.merged_max_difference is not None
    assert proof.merged_tolerance is not None
    assert proof.base_unchanged
    assert proof.disabled_equals_base
    assert proof.merged_max_difference <= proof.merged_tolerance


def test_the_folder_is_complete_and_nothing_else_is_in_it(finished: Finished) -> None:
    chat = {"chat_template.jinja"} if finished.result.tokenizer.chat_template else set()
    assert {file.name for file in finished.folder.iterdir()} == FILES | chat
    assert [entry.name for entry in finished.folder.parent.glob("run*")] == ["run"]


def test_the_files_of_a_run_have_the_modes_that_the_umask_says(finished: Finished) -> None:
    mask = os.umask(0)
    os.umask(mask)
    entries = list(finished.folder.rglob("*"))
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in entries if entry.is_file()} == {0o666 & ~mask}
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in entries if entry.is_dir()} == {0o777 & ~mask}


def test_the_folder_says_what_the_run_said(finished: Finished) -> None:
    assert finished.result.folder == finished.folder
    assert read_run(finished.folder)[0] == finished.result.summary


def test_the_opened_run_measures_what_the_summary_says(finished: Finished) -> None:
    found, _ = open_run(finished.folder).evaluate(finished.held)
    after = finished.result.summary.after
    assert found.loss == pytest.approx(after.loss, abs=SAME_LOSS)
    assert (found.accuracy, found.num_rows, found.confusion) == (after.accuracy, after.num_rows, after.confusion)


def test_samples_are_questions_of_the_held_rows_with_both_answers(finished: Finished) -> None:
    summary = finished.result.summary
    held = table_from_rows(json.loads(line) for line in finished.held.read_text(encoding="utf-8").splitlines())
    encoded = finished.result.spec.read(held, finished.result.tokenizer).rows
    if summary.task != "language-modeling":
        assert {(s.input, s.expected) for s in summary.samples} <= {(row.prompt, row.expected) for row in encoded}
    assert len(summary.samples) >= 3
    assert all(sample.input.strip() for sample in summary.samples)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_peft_reads_the_folder_and_gives_the_same_outputs(
    quick_fit: Fit, bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import transformers

    classifies = kind == "bert"
    result = quick_fit(kind, "classified" if classifies else "prompted", output=tmp_path / "run")
    names = {"bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}
    auto = getattr(transformers, names.get(kind, "AutoModelForCausalLM"))
    settings = {"num_labels": len(result.spec.labels)} if classifies else {}
    with warnings.catch_warnings():
        # transformers 5 renamed the attribute that PEFT reads; PEFT mends fan_in_fan_out and says so.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        model = peft.PeftModel.from_pretrained(auto.from_pretrained(bases(kind), **settings), tmp_path / "run").eval()
    ids = torch.tensor([[5, 6, 7, 8, 1]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, result.model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dora", "rank": 4},
        {"method": {"name": "lora", "scaling": "rslora", "dropout": 0.1}, "rank": 4, "alpha": 8},
        {"method": {"name": "lora", "bias": "all"}},
        {"layers": "last:1"},
        {"layers": [0]},
        {"targets": ["query", "value"], "train_modules": "LayerNorm"},
        {"dtype": "bf16"},
        {"micro_batch": 3},
        {"weight_decay": 0.1, "clip_norm": 0.5},
        {"epochs": 0.5, "max_steps": 100},
    ],
    ids=lambda settings: ", ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_a_setting_holds_from_the_run_to_the_opened_folder(
    quick_fit: Fit, rows_of: Rows, tmp_path: Path, settings: dict[str, Any]
) -> None:
    summary = quick_fit(output=tmp_path / "run", **settings).summary
    again = open_run(tmp_path / "run")
    assert summary.proof is not None
    assert summary.proof.base_unchanged
    assert summary.proof.disabled_equals_base
    assert summary.proof.merged_max_difference <= summary.proof.merged_tolerance  # type: ignore[operator]
    assert again.handle.entry("default").method.summary() == summary.method
    assert again.evaluate(table_from_rows(rows_of("classified", seed=5)))[0].num_rows == 60


def test_layers_keep_the_adapter_to_their_blocks(quick_fit: Fit) -> None:
    paths = quick_fit(layers="last:1", max_steps=1).handle.entry("default").paths
    assert paths
    assert all(".layer.1." in path for path in paths)


def test_modules_trained_in_full_are_the_adapters_own_copies(quick_fit: Fit, bases: Callable[[str], Path]) -> None:
    from transformers import AutoModel

    result = quick_fit(train_modules="LayerNorm")
    changed = [name for name in result.handle.parameters() if "LayerNorm" in name]
    base = AutoModel.from_pretrained(bases("bert"), add_pooling_layer=False).state_dict()
    model: Any = result.model
    assert changed
    assert result.summary.num_head > 0
    assert all(torch.equal(model.bert.state_dict()[name], tensor) for name, tensor in base.items())


def test_a_bf16_base_stays_in_bf16_and_its_adapter_in_fp32(quick_fit: Fit) -> None:
    result = quick_fit("llama-bf16", "prompted", dtype="bf16", max_steps=30, lr=2e-2)
    assert next(result.model.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in result.handle.parameters().values()} == {torch.float32}
    assert result.summary.after.loss < result.summary.before.loss


def test_the_kept_adapter_is_the_one_with_the_lowest_loss_measured(quick_fit: Fit, rows_of: Rows) -> None:
    seen: list[tuple[int, float, bool]] = []

    class Watch(Observer):
        def evaluation(self, step: int, epoch: float, evaluation: Evaluation, best: bool) -> None:
            seen.append((step, evaluation.loss, best))

    # Ten rows whose labels have nothing to do with the texts: what is learned of them is wrong elsewhere.
    rows = [{**row, "label": str(i % 2)} for i, row in enumerate(rows_of("classified", 16))]
    result = quick_fit("bert", rows, observer=Watch(), lr=5e-2, epochs=12, max_steps=None, batch_size=8, validation=0.4)
    step, lowest = min(((step, loss) for step, loss, _ in seen), key=lambda pair: pair[1])
    assert step < seen[-1][0], "the loss never rose: the case shows nothing"
    assert result.summary.after.loss == pytest.approx(lowest, abs=SAME_LOSS)
    assert any(f"step {step:,}" in note for note in result.summary.notes)


def test_labels_that_are_whole_numbers_are_classes_in_their_order(quick_fit: Fit, rows_of: Rows) -> None:
    numbers = {"red": 10, "green": 2, "blue": 9}
    rows = [{"text": row["text"], "label": numbers[row["label"]]} for row in rows_of("classified")]
    assert quick_fit("bert", rows).summary.labels == ("2", "9", "10")


def test_classes_keep_the_order_of_the_models_own_head(
    quick_fit: Fit, build: Any, tokenizer: Any, rows_of: Rows
) -> None:
    model = build("bert")
    model.config.id2label = {0: "red", 1: "blue", 2: "green"}
    result = fit(model, rows_of("classified"), tokenizer=tokenizer("bert"), max_steps=1)
    assert result.spec.labels == ("red", "blue", "green")


def test_columns_of_the_validation_rows_may_have_other_names(quick_fit: Fit, rows_of: Rows, tmp_path: Path) -> None:
    held = [{"sentence": row["text"], "intent": row["label"]} for row in rows_of("classified", 9, seed=5)]
    (tmp_path / "held.json").write_text(json.dumps(held), encoding="utf-8")
    assert quick_fit(validation=str(tmp_path / "held.json")).summary.after.num_rows == 9


def test_one_validation_row_is_enough(quick_fit: Fit, rows_of: Rows, tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text(json.dumps(rows_of("classified", 1, seed=5)), encoding="utf-8")
    assert quick_fit(validation=str(tmp_path / "held.json")).summary.before.num_rows == 1


def test_fewer_rows_than_a_batch_are_one_batch(quick_fit: Fit, rows_of: Rows) -> None:
    summary = quick_fit("llama", rows_of("prompted", 6), batch_size=64, epochs=3, max_steps=None).summary
    choices = {choice.name: choice for choice in summary.choices}
    assert (summary.num_steps, summary.num_epochs) == (3, 3.0)
    assert choices["batch_size"].value == str(summary.num_train_rows)
    assert choices["batch_size"].reason != "as asked"


@pytest.mark.parametrize("kind", ["bert", "gpt2-classifier"])
def test_a_model_object_is_adapted_in_place(build: Any, tokenizer: Any, rows_of: Rows, kind: str) -> None:
    model, rows = build(kind), rows_of("classified")
    words = tokenizer("gpt2" if kind == "gpt2-classifier" else "bert")
    result = fit(model, rows, tokenizer=words, max_steps=12, lr=2e-2)
    assert result.model is model
    assert result.summary.after.loss < result.summary.before.loss


def test_the_run_of_a_model_object_opens_on_its_base(
    bases: Callable[[str], Path], tokenizer: Any, rows_of: Rows, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bases("llama"))
    result = fit(model, rows_of("prompted"), tokenizer=tokenizer("llama"), max_steps=4, output=tmp_path / "run")
    found, _ = open_run(tmp_path / "run").evaluate(table_from_rows(rows_of("prompted", seed=5)))
    direct = fit_again(result, rows_of("prompted", seed=5))
    assert found.loss == pytest.approx(direct.loss, abs=SAME_LOSS)


def fit_again(result: FitResult, rows: list[dict[str, Any]]) -> Evaluation:
    """Measure the model that a fit has left."""
    from lorakit.training.objectives import evaluate

    encoded = result.spec.read(table_from_rows(rows), result.tokenizer)
    return evaluate(result.model, encoded.rows, result.spec.collator(result.tokenizer), result.spec.labels)


def test_a_model_that_was_detached_can_be_fitted_again_alike(build: Any, tokenizer: Any, rows_of: Rows) -> None:
    model, rows, words = build("bert"), rows_of("classified"), tokenizer("bert")
    first = fit(model, rows, tokenizer=words, max_steps=6)
    bits = [p.detach().clone() for p in first.handle.parameters().values()]
    first.handle.detach()
    second = fit(model, rows, tokenizer=words, max_steps=6)
    assert all(torch.equal(a, b) for a, b in zip(bits, second.handle.parameters().values(), strict=True))


class Fails(Observer):
    """Breaks off at the second step."""

    def step(self, step: Step) -> None:
        if step.step == 2:
            raise TrainingError("the power went out")


def test_after_an_error_a_model_object_is_what_it_was(build: Any, tokenizer: Any, rows_of: Rows) -> None:
    model: nn.Module = build("bert")
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    with pytest.raises(TrainingError, match="power"):
        fit(model, rows_of("classified"), tokenizer=tokenizer("bert"), observer=Fails())
    after = dict(model.named_parameters())
    assert handle_of(model) is None
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) and after[n].requires_grad == flag for n, (t, flag) in before.items())
    assert not any(module.training for module in model.modules())


class PressesCtrlC(Observer):
    """Presses Ctrl-C in the third step."""

    def step(self, step: Step) -> None:
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_the_adapter_so_far_whole(quick_fit: Fit, tmp_path: Path) -> None:
    result = quick_fit(observer=PressesCtrlC(), output=tmp_path / "run", max_steps=30)
    saved, metrics = read_run(tmp_path / "run")
    assert (saved.finished, saved.num_steps) == (False, 3)
    assert [line["step"] for line in metrics if line["kind"] == "train"] == [1, 2, 3]
    again = open_run(tmp_path / "run").handle.parameters()
    for name, parameter in result.handle.parameters().items():
        assert torch.equal(again[name], parameter)


class PressesEarly(Observer):
    """Presses Ctrl-C before the first step."""

    def choices(self, choices: Any) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick_fit(observer=PressesEarly(), output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_the_settings_it_wrote_down_is_the_same_run(quick_fit: Fit, rows_of: Rows, tmp_path: Path) -> None:
    from lorakit.training.config import read_config

    first = quick_fit(output=tmp_path / "run", rank=4, seed=2)
    config = read_config(tmp_path / "run" / "config.yaml")
    again = fit(first.summary.model, rows_of("classified"), config=config)
    pairs = zip(first.handle.parameters().values(), again.handle.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_summary_says_what_was_counted(quick_fit: Fit, tmp_path: Path) -> None:
    result = quick_fit(output=tmp_path / "run", rank=4, targets="query")
    summary, model = result.summary, result.model
    base = sum(p.numel() for name, p in model.named_parameters() if "lorakit" not in name)
    head = sum(p.numel() for name, p in result.handle.parameters().items() if "classifier" in name or "pooler" in name)
    low_rank = 2 * 4 * (32 + 32)  # two layers' A and B of rank 4

    assert (summary.num_base, summary.num_head) == (base, head)
    assert summary.num_trainable == head + low_rank
    assert summary.adapter_bytes == (tmp_path / "run" / "adapter_model.safetensors").stat().st_size
    assert summary.num_train_rows == 48
    assert summary.peak_memory_bytes is not None
    assert summary.peak_memory_bytes > 4 * 4 * summary.num_trainable
    assert summary.version == lorakit.__version__
    assert [spectrum.path for spectrum in summary.spectra] == list(result.handle.entry("default").paths)


def test_every_choice_is_said_once_with_its_reason(quick_fit: Fit) -> None:
    choices = quick_fit(rank=4).summary.choices
    names = [choice.name for choice in choices]
    assert len(names) == len(set(names))
    assert all(choice.reason for choice in choices)
    assert {"task", "device", "dtype", "method", "targets", "lr", "epochs", "batch_size", "rows"} <= set(names)


def test_fit_is_silent(quick_fit: Fit, bases: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    bases("llama")
    capfd.readouterr()
    quick_fit("llama", "prompted", max_steps=2)
    assert capfd.readouterr() == ("", "")


def test_a_real_model_learns_in_a_few_steps(minilm: Path, rows_of: Rows) -> None:
    result = fit(minilm, rows_of("classified", 24), max_steps=10, max_length=16, rank=4)
    assert result.summary.after.loss < result.summary.before.loss
    assert result.summary.proof is not None
    assert result.summary.proof.base_unchanged
