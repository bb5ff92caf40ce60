"""What cannot be done is refused with what was asked, what was found and what to do; nothing is written then."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lorakit.adapters import attach, handle_of
from lorakit.errors import (
    AdapterError,
    ConfigError,
    DataError,
    InputError,
    ModelError,
    RunFolderError,
    ShapeError,
    TargetError,
    TrainingError,
)
from lorakit.training.config import TrainConfig
from lorakit.training.fit import FitResult, fit
from lorakit.training.observe import Observer, Step

Fit = Callable[..., FitResult]
Rows = Callable[..., list[dict[str, Any]]]


class NoTraining(Observer):
    """Fails where a step is taken: a refusal comes before any training."""

    def step(self, step: Step) -> None:
        raise AssertionError("a step was taken")


REFUSED: dict[str, tuple[dict[str, Any], type[InputError], str]] = {
    "unknown setting": ({"rnak": 8}, ConfigError, "unknown field 'rnak'. Closest: 'rank'"),
    "several wrong settings": ({"lr": -1, "epoch": 2}, ConfigError, "2 problems"),
    "set twice": ({"config": {"lr": 0.1}, "lr": 0.2}, ConfigError, "set twice, in config and by keyword: lr"),
    "rank set twice": ({"method": {"name": "lora", "rank": 4}, "rank": 8}, ConfigError, "rank is set twice"),
    "unknown method": ({"method": "lroa"}, ConfigError, "no method 'lroa'. Closest: 'lora'"),
    "field of the method": ({"method": {"name": "lora", "rnk": 4}}, ConfigError, "unknown field 'rnk'"),
    "rank too high": ({"rank": 33}, ShapeError, "rank 33 is above the smaller side"),
    "target": ({"targets": "q_proj"}, TargetError, "'q_proj'"),
    "too long": ({"max_length": 65}, ConfigError, "max_length 65 is above the model's context of 64 tokens"),
    "device": ({"device": "cuda:99"}, ConfigError, "device 'cuda:99'|unknown device"),
    "unknown task": ({"task": "clasification"}, ConfigError, "no task 'clasification'. Closest: 'classification'"),
    "unknown optimizer": (
        {"optimizer": "adam"},
        ConfigError,
        "optimizer: Input should be 'adamw', 'sgd' or 'adafactor'",
    ),
    "unknown schedule": (
        {"schedule": "step"},
        ConfigError,
        "schedule: Input should be 'linear', 'cosine' or 'constant'",
    ),
    "warm-up of broken steps": ({"warmup": 1.5}, ConfigError, "a share of the steps below 1, or a whole number"),
    "no checkpoint kept": ({"keep": 0}, ConfigError, "keep: "),
    "no patience": ({"patience": 0}, ConfigError, "patience: "),
    "task of other rows": ({"task": "generation"}, DataError, "do not fit the task 'generation'"),
    "no validation file": ({"validation": "missing.jsonl"}, DataError, "missing.jsonl"),
    "validation share": ({"validation": 1.5}, ConfigError, "validation"),
    "revision of a folder": ({"revision": "main"}, ModelError, "has no revisions"),
    "a tokenizer for a name": ({"tokenizer": "bert"}, ConfigError, "a tokenizer was given"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_settings_are_refused_before_anything_is_written(
    bases: Callable[[str], Path],
    tokenizer: Any,
    rows_of: Rows,
    tmp_path: Path,
    settings: dict[str, Any],
    kind: type[InputError],
    message: str,
) -> None:
    if "tokenizer" in settings:
        settings = {"tokenizer": tokenizer(settings["tokenizer"])}
    out = tmp_path / "run"
    with pytest.raises(kind, match=message.replace("(", r"\(").replace(".", r"\.")):
        fit(bases("bert"), rows_of("classified"), observer=NoTraining(), output=out, **settings)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_config_value_may_be_changed_by_keyword(quick_fit: Fit) -> None:
    assert quick_fit(config=TrainConfig(rank=4, max_steps=9), max_steps=2, rank=2).summary.method["rank"] == 2


def test_one_class_is_no_classification(quick_fit: Fit, rows_of: Rows) -> None:
    rows = [{**row, "label": "red"} for row in rows_of("classified")]
    with pytest.raises(DataError, match="every 'label' is 'red'"):
        quick_fit("bert", rows)


def test_a_label_that_training_lacks_is_named_with_its_row(quick_fit: Fit, rows_of: Rows, tmp_path: Path) -> None:
    rows = rows_of("classified", 9, seed=5)
    rows[4]["label"] = "purple"
    (tmp_path / "held.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match="record 5: label 'purple'"):
        quick_fit(validation=str(tmp_path / "held.json"))


@pytest.mark.parametrize(
    ("layout", "message"), [("talked", "messages, .* prompt-completion"), ("instructed", "instruction-output, ")]
)
def test_validation_rows_of_another_layout_are_refused(
    quick_fit: Fit, rows_of: Rows, tmp_path: Path, layout: str, message: str
) -> None:
    (tmp_path / "held.json").write_text(json.dumps(rows_of(layout)), encoding="utf-8")
    with pytest.raises(DataError, match=f"layout {message}.*give both alike"):
        quick_fit("llama", "prompted", validation=str(tmp_path / "held.json"))


def test_validation_rows_with_a_field_that_training_lacks_are_refused(
    quick_fit: Fit, rows_of: Rows, tmp_path: Path
) -> None:
    (tmp_path / "held.json").write_text(json.dumps(rows_of("instructed")), encoding="utf-8")
    rows = [{key: value for key, value in row.items() if key != "input"} for row in rows_of("instructed")]
    with pytest.raises(DataError, match=r"has 'input' too, which .* lacks"):
        quick_fit("llama", rows, validation=str(tmp_path / "held.json"))


@pytest.mark.parametrize("rows", ["prompted", "written"])
def test_an_encoder_cannot_write(quick_fit: Fit, rows: str) -> None:
    with pytest.raises(ModelError, match="encoder-only"):
        quick_fit("bert", rows)


def test_a_model_object_needs_its_tokenizer(build: Any, rows_of: Rows) -> None:
    with pytest.raises(ConfigError, match=r"fit\(model, rows, tokenizer=\.\.\.\)"):
        fit(build("bert"), rows_of("classified"))


def test_a_torch_model_of_another_kind_is_pointed_to_attach(tokenizer: Any, rows_of: Rows) -> None:
    with pytest.raises(ModelError, match=r"not a Linear\. .*lorakit\.attach"):
        fit(nn.Linear(2, 2), rows_of("classified"), tokenizer=tokenizer("bert"))


@pytest.mark.parametrize("settings", [{"dtype": "bf16"}, {"device": "cpu"}, {"revision": "main"}], ids=str)
def test_settings_for_loading_have_no_effect_on_a_model_object(
    build: Any, tokenizer: Any, rows_of: Rows, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(settings))}' cannot be set for a model object"):
        fit(build("bert"), rows_of("classified"), tokenizer=tokenizer("bert"), **settings)


def test_a_model_object_with_adapters_is_refused_and_keeps_them(build: Any, tokenizer: Any, rows_of: Rows) -> None:
    model = build("bert")
    handle = attach(model, "lora", name="mine")
    with pytest.raises(AdapterError, match=r"adapters already: 'mine'\. .*detach\(\)"):
        fit(model, rows_of("classified"), tokenizer=tokenizer("bert"))
    assert handle_of(model) is handle


def test_a_model_object_with_another_number_of_classes_is_refused(build: Any, tokenizer: Any, rows_of: Rows) -> None:
    with pytest.raises(ConfigError, match="the model has 3 classes, the rows 2: green, red"):
        fit(build("bert"), rows_of("classified", classes=2), tokenizer=tokenizer("bert"))


def test_a_model_object_with_the_head_of_another_task_is_refused_and_left_alone(
    build: Any, tokenizer: Any, rows_of: Rows
) -> None:
    model = build("llama")
    model.config.num_labels = 3
    with pytest.raises(ModelError, match="this task needs one score per class"):
        fit(model, rows_of("classified"), tokenizer=tokenizer("llama"), observer=NoTraining())
    assert handle_of(model) is None


def test_an_encoder_object_cannot_write(build: Any, tokenizer: Any, rows_of: Rows) -> None:
    with pytest.raises(ModelError, match="BertForSequenceClassification is an encoder"):
        fit(build("bert"), rows_of("prompted"), tokenizer=tokenizer("bert"))


def test_a_classifier_that_pads_with_its_end_of_text_learns(bases: Any, tokenizer: Any, rows_of: Rows) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bases("gpt2"), num_labels=3)
    model.config.pad_token_id = None
    words = tokenizer("gpt2")
    assert words.pad_token is None
    fit(model, rows_of("classified"), tokenizer=words, max_steps=2)
    assert model.config.pad_token_id == words.pad_token_id == words.eos_token_id


@pytest.mark.parametrize(("kind", "rows"), [("bert", "classified"), ("llama", "prompted")])
def test_a_run_that_diverges_names_the_step_and_leaves_nothing(
    quick_fit: Fit, tmp_path: Path, kind: str, rows: str
) -> None:
    with pytest.raises(TrainingError, match=r"(nan|inf).* step \d+.*(a tenth|lower learning rate)"):
        quick_fit(kind, rows, lr=1e30, clip_norm=1e30, max_steps=40, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_folder_is_refused_before_the_model_is_loaded(rows_of: Rows, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"exists already.*--force"):
        fit("no/such-model", rows_of("classified"), output=tmp_path / "run")


def test_weights_that_are_no_numbers_are_refused(bases: Callable[[str], Path], rows_of: Rows, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(bases("bert"))
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bases("bert")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="NaN or infinity"):
        fit(tmp_path, rows_of("classified"))
