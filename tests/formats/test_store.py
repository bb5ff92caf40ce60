"""Saving whole or not at all, and loading only onto the base that an adapter belongs to."""

from __future__ import annotations

import copy
import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lorakit.adapters import handle_of
from lorakit.errors import (
    BaseMismatchError,
    FormatError,
    InputError,
    RunFolderError,
    ShapeError,
    TargetError,
    TrainingError,
)
from lorakit.formats import load_adapter, read_adapter, save_adapter
from lorakit.formats.peft import CONFIG, TENSORS
from lorakit.formats.tensors import read_tensors
from lorakit.methods.lora import LoRA

from .models import build, output, shaken

METHOD = LoRA(rank=4, alpha=6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with an adapter of the tiny Bert with its classifier."""
    model, _ = build("bert")
    handle = shaken(model, METHOD, ["query"], train_modules=["classifier"])
    save_adapter(handle, tmp_path / "adapter", base_name="some/bert", revision="abc", task_type="SEQ_CLS")
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unverified(folder: Path) -> None:
    """Write the tensors as PEFT does, without our metadata."""
    save_file(dict(read_tensors(folder / TENSORS).tensors), folder / TENSORS, {"format": "pt"})


def test_saving_says_what_it_wrote_and_writes_nothing_else(saved: Path) -> None:
    model, _ = build("bert")
    written = save_adapter(shaken(model, METHOD, ["query"]), saved.parent / "other")
    assert written == [saved.parent / "other" / CONFIG, saved.parent / "other" / TENSORS]
    assert sorted(contents(saved.parent / "other")) == [CONFIG, TENSORS]


def test_saving_needs_force_where_an_adapter_is(saved: Path) -> None:
    before = contents(saved)
    handle = shaken(build("bert")[0], METHOD, ["key"])
    with pytest.raises(RunFolderError, match="holds an adapter already"):
        save_adapter(handle, saved)
    assert contents(saved) == before
    save_adapter(handle, saved, force=True)
    assert read_adapter(saved).targets == ("key",)


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):
        save_adapter(shaken(build("bert")[0], METHOD, ["key"]), tmp_path / "taken", force=True)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_leaves_the_old_adapter_whole(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = contents(saved)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"as far as it went")
        raise error

    monkeypatch.setattr("lorakit.formats.tensors.save_file", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        save_adapter(shaken(build("bert")[0], METHOD, ["key"]), saved, force=True)
    assert contents(saved) == before


def test_saving_in_bf16_rounds_once_and_halves_the_file(tmp_path: Path) -> None:
    handle = shaken(build("bert")[0], METHOD, ["query"], train_modules=["classifier"])
    save_adapter(handle, tmp_path, dtype=torch.bfloat16)
    for path, site in handle.state().sites.items():
        found = read_adapter(tmp_path).sites[path].tensors
        assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in site.tensors.items())
    assert {t.dtype for t in read_tensors(tmp_path / TENSORS).tensors.values()} == {torch.bfloat16}


def test_one_of_several_adapters_is_saved_by_name(tmp_path: Path) -> None:
    handle = shaken(build("bert")[0], METHOD, ["query"])
    handle.add("second", METHOD, ["key"])
    save_adapter(handle, tmp_path, "default")
    assert read_adapter(tmp_path).targets == ("query",)


def test_loading_adds_to_the_adapters_that_are_there(saved: Path) -> None:
    model, inputs = build("bert")
    handle = shaken(model, METHOD, ["key"])
    first = output(model, inputs)
    assert load_adapter(model, saved, "second") is handle
    assert handle.names == ["default", "second"]
    second = output(model, inputs)
    assert not torch.equal(first, second)
    with handle.using("default"):
        assert torch.equal(output(model, inputs), first)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_trains_only_if_asked(saved: Path, trainable: bool) -> None:
    handle = load_adapter(build("bert")[0], saved, trainable=trainable)
    assert {p.requires_grad for p in handle.parameters().values()} == {trainable}


def test_what_was_loaded_is_saved_again_with_the_same_tensors(saved: Path, tmp_path: Path) -> None:
    handle = load_adapter(build("bert")[0], saved)
    save_adapter(handle, tmp_path / "again", base_name="some/bert", revision="abc", task_type="SEQ_CLS")
    assert contents(tmp_path / "again") == contents(saved)


def test_another_base_is_named(saved: Path) -> None:
    model, _ = build("bert")
    with torch.no_grad():
        model.get_parameter("bert.embeddings.word_embeddings.weight").add_(1)
    keys = list(model.state_dict())
    with pytest.raises(BaseMismatchError, match=r"(?s)belongs to the base 'some/bert' \(\w{12}\).*other weights"):
        load_adapter(model, saved)
    assert handle_of(model) is None
    assert list(model.state_dict()) == keys


def test_another_base_is_accepted_where_the_check_is_off(saved: Path) -> None:
    model, _ = build("bert")
    with torch.no_grad():
        model.get_parameter("bert.embeddings.word_embeddings.weight").add_(1)
    assert load_adapter(model, saved, check_base=False).names == ["default"]


def test_the_base_may_be_held_in_bf16(saved: Path) -> None:
    assert load_adapter(build("bert")[0].bfloat16(), saved).names == ["default"]


def test_another_classifier_is_no_other_base(saved: Path) -> None:
    model, _ = build("bert")
    nn.init.normal_(model.get_parameter("classifier.weight"))
    assert load_adapter(model, saved).names == ["default"]


def test_a_file_that_names_no_base_is_said_to_be_unverified(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    unverified(saved)
    with caplog.at_level(logging.WARNING, "lorakit"):
        load_adapter(build("bert")[0], saved)
    assert [record.message for record in caplog.records] == [
        f"adapter '{saved}' does not say which base it belongs to: unverified."
    ]


def test_an_adapter_of_other_layers_leaves_the_model_as_it_was(saved: Path) -> None:
    unverified(saved)
    model, inputs = build("gpt2")
    before, classes = output(model, inputs), [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=r"(?s)does not fit this GPT2ForSequenceClassification.*query"):
        load_adapter(model, saved)
    assert handle_of(model) is None
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(output(model, inputs), before)


def test_every_layer_of_another_size_is_named(saved: Path) -> None:
    unverified(saved)
    model, _ = build("bert")
    for i in range(2):
        model.get_submodule(f"bert.encoder.layer.{i}.attention.self").query = nn.Linear(16, 8)
    with pytest.raises(ShapeError, match=r"(?s)layer\.0\.attention\.self\.query.*layer\.1\.attention\.self\.query"):
        load_adapter(model, saved)
    assert handle_of(model) is None


def test_a_classifier_of_another_size_is_refused(saved: Path) -> None:
    model, _ = build("bert")
    model.classifier = nn.Linear(16, 5)
    with pytest.raises(ShapeError, match="classifier"):
        load_adapter(model, saved)
    assert handle_of(model) is None


def test_a_kernel_of_another_form_is_refused_though_its_matrix_would_fit(tmp_path: Path) -> None:
    save_adapter(shaken(build("conv")[0], METHOD, ["first"]), tmp_path)
    unverified(tmp_path)
    model, _ = build("conv")
    model.first = nn.Conv2d(3, 8, (5, 3), stride=2, padding=(2, 1))
    with pytest.raises(ShapeError, match=r"'first' has a weight \(8, 3, 5, 3\) here, \(8, 3, 3, 5\)"):
        load_adapter(model, tmp_path)


def test_a_taken_name_is_refused_and_the_first_adapter_stays(saved: Path) -> None:
    model, inputs = build("bert")
    handle = load_adapter(model, saved)
    before = output(model, inputs)
    with pytest.raises(InputError, match="attached already"):
        load_adapter(model, saved)
    assert handle.names == ["default"]
    assert torch.equal(output(model, inputs), before)


@pytest.fixture
def with_base_weight(tmp_path: Path) -> Path:
    """Return an adapter on the embedding of the tiny Llama, with the base's table beside it as PEFT saves it."""
    model, _ = build("llama")
    table = copy.deepcopy(model.get_parameter("model.embed_tokens.weight").detach())
    save_adapter(shaken(model, METHOD, ["embed_tokens"]), tmp_path)
    tensors = {
        **read_tensors(tmp_path / TENSORS).tensors,
        "base_model.model.model.embed_tokens.base_layer.weight": table,
    }
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    return tmp_path


def test_the_bases_own_weight_beside_an_adapter_is_no_part_of_it(with_base_weight: Path) -> None:
    load_adapter(build("llama")[0], with_base_weight)
    state = read_adapter(with_base_weight)
    assert list(state.sites) == ["model.embed_tokens"]
    assert state.modules == {}


def test_a_base_weight_beside_an_adapter_that_is_another_ones_is_refused(with_base_weight: Path) -> None:
    model, _ = build("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(2)
    with pytest.raises(FormatError, match="weights of its base that are not this model's"):
        load_adapter(model, with_base_weight)
    assert handle_of(model) is None
