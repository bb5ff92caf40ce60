"""Opening what a run left behind: predicting, writing, and bare PEFT folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import BaseMismatchError, DataError, InputError, RunFolderError
from lorakit.training.data.read import table_from_rows
from lorakit.training.fit import FitResult
from lorakit.training.runs import Run, open_run

Fit = Callable[..., FitResult]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def classifier(quick_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a classifier that has learned its colours."""
    out = tmp_path_factory.mktemp("runs") / "classifier"
    quick_fit("gpt2", max_steps=None, epochs=30, lr=1e-2, output=out)
    return out


@pytest.fixture(scope="module")
def writer(quick_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a writer."""
    out = tmp_path_factory.mktemp("runs") / "writer"
    quick_fit("llama", "instructed", max_steps=40, lr=2e-2, output=out)
    return out


@pytest.fixture
def bare(classifier: Path, tmp_path: Path) -> Path:
    """Return the classifier's adapter as PEFT would have saved it."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(classifier / name, tmp_path / name)
    return tmp_path


def changed_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_classifier_predicts_what_it_learned(classifier: Path, rows_of: Rows) -> None:
    rows = rows_of("classified", 30, seed=9)
    found = open_run(classifier).predict([row["text"] for row in rows])
    hits = [p.label == row["label"] for p, row in zip(found, rows, strict=True)]
    assert sum(hits) > 0.8 * len(hits)


def test_a_prediction_is_the_softmax_of_the_logits_in_the_order_of_the_texts(classifier: Path) -> None:
    run, texts = open_run(classifier), ["the red house", "green", "a very very old blue boat is here"]
    for text, found in zip(texts, run.predict(texts), strict=True):
        ids = torch.tensor([run.base.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            shares = run.base.model(input_ids=ids).logits.softmax(-1)[0]
        assert list(found.probabilities) == list(run.spec.labels)
        assert list(found.probabilities.values()) == pytest.approx(shares.tolist(), abs=1e-5)
        assert (found.text, found.label) == (text, run.spec.labels[int(shares.argmax())])


def test_no_texts_give_no_predictions(classifier: Path) -> None:
    assert open_run(classifier).predict([]) == []


def test_a_writer_writes_from_the_wording_it_was_trained_on(writer: Path) -> None:
    run = open_run(writer)
    assert run.worded("what is") == "### Instruction:\nwhat is\n\n### Response:\n"
    text = run.generate(["the grey house"], max_new_tokens=4)[0]
    assert "".join(run.stream("the grey house", max_new_tokens=4)).split() == text.split()
    assert text.split()


@pytest.mark.parametrize(("folder", "use"), [("classifier", "generate"), ("writer", "predict")])
def test_a_run_says_what_it_is_for(request: pytest.FixtureRequest, folder: str, use: str) -> None:
    run: Run = open_run(request.getfixturevalue(folder))
    with pytest.raises(InputError, match=f"'{use}' needs .* Use '(generate|predict)'"):
        getattr(run, use)(["the red house"])


def test_rows_of_another_task_are_refused(writer: Path, rows_of: Rows) -> None:
    with pytest.raises(DataError, match="do not fit the task 'generation'"):
        open_run(writer).evaluate(table_from_rows(rows_of("classified")))


def test_a_class_that_the_run_does_not_know_is_named(classifier: Path) -> None:
    with pytest.raises(DataError, match="record 2: label 'purple'"):
        open_run(classifier).evaluate(
            table_from_rows([{"text": "a", "label": "red"}, {"text": "b", "label": "purple"}])
        )


def test_an_opened_model_does_not_train(classifier: Path) -> None:
    run = open_run(classifier)
    assert not any(parameter.requires_grad for parameter in run.base.model.parameters())
    assert not any(module.training for module in run.base.model.modules())


def test_the_dtype_of_a_run_is_that_of_its_training(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("llama-bf16", "prompted", dtype="bf16", max_steps=1, output=tmp_path / "run")
    assert next(open_run(tmp_path / "run").base.model.parameters()).dtype == torch.bfloat16
    assert next(open_run(tmp_path / "run", dtype="fp32").base.model.parameters()).dtype == torch.float32


def test_a_bare_folder_takes_its_classes_from_the_head(bare: Path) -> None:
    assert open_run(bare).spec.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert open_run(bare, labels=("x", "y", "z")).spec.labels == ("x", "y", "z")
    with pytest.raises(InputError, match="has 3 classes, but 2 labels were given"):
        open_run(bare, labels=("x", "y"))


def test_a_pooler_beside_the_head_is_not_taken_for_it(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("bert", max_steps=1, output=tmp_path / "run")
    (tmp_path / "run" / "task.json").unlink()
    assert len(open_run(tmp_path / "run").spec.labels) == 3


def test_a_bare_folder_gives_the_runs_own_outputs(classifier: Path, bare: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first, second = (open_run(folder).base.model(input_ids=ids).logits for folder in (classifier, bare))
    assert torch.equal(first, second)


def test_a_folder_that_does_not_name_its_base_asks_for_it(bare: Path, bases: Callable[[str], Path]) -> None:
    changed_config(bare, base_model_name_or_path=None)
    with pytest.raises(RunFolderError, match=r"does not say which base.*--base MODEL"):
        open_run(bare)
    assert open_run(bare, str(bases("gpt2"))).spec.task == "classification"


def test_another_base_is_refused(writer: Path, bases: Callable[[str], Path]) -> None:
    with pytest.raises(BaseMismatchError, match="belongs to the base"):
        open_run(writer, str(bases("llama-tied")))


def test_a_base_that_has_moved_is_missed_by_name(bare: Path) -> None:
    changed_config(bare, base_model_name_or_path=str(bare / "gone"))
    with pytest.raises(RunFolderError, match=r"gone', is not there any more\. Give it with --base MODEL"):
        open_run(bare)


def test_a_missing_folder_names_what_is_near(writer: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run folder '.*wrter'\. Closest: 'writer'"):
        open_run(writer.parent / "wrter")


def test_a_model_folder_is_no_run(bases: Callable[[str], Path]) -> None:
    with pytest.raises(RunFolderError, match=r"no adapter_config\.json\)\. It is a model"):
        open_run(bases("bert"))
