from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lorakit.bases import read_header
from lorakit.errors import FormatError, ModelError

Saved = Callable[..., Path]


def test_header_equals_the_state_dict(saved: Saved) -> None:
    folder = saved("gpt2")
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state.pop("lm_head.weight")  # tied to the embedding, so written once
    found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in read_header(folder)}
    assert found == {name: (tuple(tensor.shape), "F32") for name, tensor in state.items()}


def test_shards_read_like_one_file(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole = [(tensor.name, tensor.shape, tensor.dtype) for tensor in read_header(folder)]
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in read_header(tmp_path / "shards")] == whole


def test_every_broken_shard_is_named(saved: Saved, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(saved("llama")).save_pretrained(folder, max_shard_size="8KB")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(FormatError, match=rf"(?s)2 problems.*{first.name}' is missing.*{second.name}' is broken"):
        read_header(folder)


def test_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="names tensors that their shards do not have: 'b'"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first eight bytes"),
        (b"\x10\x00", "first eight bytes"),
        ((500).to_bytes(8, "little") + b"{}", "announce a header of 500 bytes"),
        ((2).to_bytes(8, "little") + b"xx", "broken safetensors header"),
        (b"PK\x03\x04" + bytes(60), "a pickle"),
        (b"\x80\x02}q\x00." + bytes(60), "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>404</html>", "a web page"),
    ],
)
def test_file_that_is_no_safetensors_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_header(tmp_path)


def test_torch_save_under_the_name_of_safetensors_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"it is a pickle \(made by torch\.save\)"):
        read_header(tmp_path)


def test_truncated_file_is_refused(saved: Saved) -> None:
    file = saved("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="it is cut off"):
        read_header(file.parent)


def test_tensor_with_the_wrong_number_of_bytes_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FormatError, match=r"'w' \(F32 \[2, 2\]\) is given 8 bytes"):
        read_header(tmp_path)


def test_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"no 'model\.safetensors'.*it has 'config\.json'"):
        read_header(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        read_header(tmp_path / "nowhere")
