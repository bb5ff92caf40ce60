from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lorakit.bases import Base, load_base, read_header, save_model
from lorakit.errors import RunFolderError, TrainingError

Saved = Callable[..., Path]


class FullDisk(PreTrainedTokenizerFast):
    """A tokenizer whose disk has no room left."""

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def base(saved: Saved) -> Base:
    return load_base(saved("llama"), "generation")


def test_saved_folder_loads_in_transformers_bit_for_bit(base: Base, tmp_path: Path) -> None:
    folder = save_model(base.model, base.tokenizer, tmp_path / "out" / "model")
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == base.tokenizer.get_vocab()
    assert {entry.name for entry in folder.parent.iterdir()} == {"model"}


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_tied_weights_stay_tied(saved: Saved, tmp_path: Path, kind: str) -> None:
    base = load_base(saved(kind), "generation")
    names = [tensor.name for tensor in read_header(Path(base.name))]
    folder = save_model(base.model, base.tokenizer, tmp_path / "out")
    assert [tensor.name for tensor in read_header(folder)] == names


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapter_tensors_are_left_out(saved: Saved, tmp_path: Path, kind: str) -> None:
    base = load_base(saved(kind), "generation")
    names = [tensor.name for tensor in read_header(Path(base.name))]
    base.model.get_output_embeddings().add_module("lorakit", nn.Linear(2, 2))
    folder = save_model(base.model, base.tokenizer, tmp_path / "out")
    assert [tensor.name for tensor in read_header(folder)] == names


def test_existing_folder_is_never_overwritten(base: Base, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="exists already"):
        save_model(base.model, base.tokenizer, tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_empty_folder_is_filled(base: Base, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save_model(base.model, base.tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_force_replaces_a_model_and_leaves_nothing_beside_it(base: Base, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    save_model(base.model, base.tokenizer, out)
    (out / "old.txt").write_text("old")
    save_model(base.model, base.tokenizer, out, force=True)
    assert not (out / "old.txt").exists()
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_force_may_replace_the_folder_the_model_came_from(base: Base) -> None:
    expected = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    save_model(base.model, base.tokenizer, base.name, force=True)
    state = AutoModelForCausalLM.from_pretrained(base.name).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


def test_force_does_not_remove_what_is_no_model(base: Base, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="even --force does not replace it"):
        save_model(base.model, base.tokenizer, tmp_path / "home", force=True)
    assert (tmp_path / "home" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_everything_as_it_was(base: Base, tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "place" / "out"
    if existing:
        save_model(base.model, base.tokenizer, out)
    before = sorted(out.parent.rglob("*"))
    full = FullDisk(tokenizer_object=base.tokenizer.backend_tokenizer)
    with pytest.raises(TrainingError, match="the disk is full"):
        save_model(base.model, full, out, force=True)
    assert sorted(out.parent.rglob("*")) == before


def test_file_in_the_way_is_refused(base: Base, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunFolderError, match="is a file or a link"):
        save_model(base.model, base.tokenizer, tmp_path / "out", force=True)
