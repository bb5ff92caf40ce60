"""Folders of adapters on other layers than linear ones: old ones, edited ones, and what is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import AdapterState, SiteState, attach
from lorakit.errors import FormatError, ShapeError, TargetError
from lorakit.formats import PeftFormat, load_adapter, read_adapter, save_adapter
from lorakit.formats.outline import describe_adapter
from lorakit.formats.peft import CONFIG, TENSORS
from lorakit.formats.store import rounded, write_adapter
from lorakit.formats.tensors import TensorFile, read_tensors, write_tensors
from lorakit.methods.lora import LoRA

from .models import shake, shaken
from .test_peft_format import PREFIX, assert_same, edit_config, edit_tensors

METHOD = LoRA(rank=3, alpha=5)


class Layers(nn.Module):
    """One layer of each kind that a file may misunderstand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Conv1D(12, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(6, 4)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixer(nn.Module):
    """Parameters whose order is not that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(torch.randn(3, 8, 6))
        self.first = nn.Parameter(torch.randn(8, 6))
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))


def layers() -> nn.Module:
    torch.manual_seed(7)
    return Layers()


def saved(folder: Path, targets: list[str], method: LoRA = METHOD) -> AdapterState:
    handle = shaken(layers(), method, targets)
    save_adapter(handle, folder)
    return handle.state()


def by_peft(folder: Path, **config: Any) -> None:
    """Let PEFT write an adapter with numbers in it."""
    peft = pytest.importorskip("peft", reason="PEFT's own files need the real peft, from the extra 'test'")
    adapted = peft.get_peft_model(layers(), peft.LoraConfig(r=2, **{"target_modules": [], **config}))
    shake(p for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(folder)


def without_metadata(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: None)


def test_parts_without_our_metadata_are_one_whole_layer(tmp_path: Path) -> None:
    state = saved(tmp_path, ["qkv[0:4]", "qkv[8:12]"])
    without_metadata(tmp_path)
    found = read_adapter(tmp_path)
    q, v = (state.sites[path].tensors for path in ("qkv[0:4]", "qkv[8:12]"))

    assert found.method == LoRA(rank=6, alpha=10)
    assert found.targets == ("qkv",)
    assert found.sites["qkv"].kind == "transposed"
    assert torch.equal(found.sites["qkv"].tensors["A"], torch.cat([q["A"], v["A"]]))
    whole = found.sites["qkv"].tensors["B"] @ found.sites["qkv"].tensors["A"]
    torch.testing.assert_close(whole[8:], v["B"] @ v["A"])
    assert not whole[4:8].any()


def test_attention_without_our_metadata_has_both_projections(tmp_path: Path) -> None:
    state = saved(tmp_path, ["attention.in_proj_weight"])
    without_metadata(tmp_path)
    found = read_adapter(tmp_path).sites
    assert list(found) == ["attention.in_proj_weight", "attention.out_proj"]
    assert torch.equal(
        found["attention.in_proj_weight"].tensors["B"], state.sites["attention.in_proj_weight"].tensors["B"]
    )
    assert not found["attention.out_proj"].tensors["B"].any()


def test_experts_without_our_metadata_are_named_by_the_config(tmp_path: Path) -> None:
    state = saved(tmp_path, ["mixer.gate_up_proj", "mixer.down_proj"])
    without_metadata(tmp_path)
    found = read_adapter(tmp_path)
    assert list(found.sites) == ["mixer.gate_up_proj", "mixer.down_proj"]
    for path, site in state.sites.items():
        assert all(torch.equal(found.sites[path].tensors[name], tensor) for name, tensor in site.tensors.items())


def test_our_own_form_without_its_metadata_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, ["attention.out_proj"])
    without_metadata(tmp_path)
    with pytest.raises(FormatError, match="has lost its metadata"):
        read_adapter(tmp_path)


def test_a_folder_of_an_older_version_still_loads(tmp_path: Path) -> None:
    """As version 0.1 wrote it: the layers that store [d_in, d_out] in the metadata, and nothing else of layers."""
    tensors = {}
    for path, (rows, columns) in {"qkv": (12, 6), "head": (5, 12)}.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(3, columns)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(rows, 3)
    metadata = {"format": "pt", "lorakit.method": json.dumps(METHOD.summary()), "lorakit.transposed": '["qkv"]'}
    write_tensors(tmp_path / TENSORS, TensorFile(tensors, metadata))
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["head", "qkv"], "fan_in_fan_out": False}
    (tmp_path / CONFIG).write_text(json.dumps(config))

    state = read_adapter(tmp_path)
    assert state.method == METHOD
    assert {path: (site.kind, site.weight_shape) for path, site in state.sites.items()} == {
        "head": ("linear", (5, 12)),
        "qkv": ("transposed", (6, 12)),
    }


def test_an_alpha_edited_in_the_config_counts_for_every_part(tmp_path: Path) -> None:
    saved(tmp_path, ["qkv[0:4]", "qkv[8:12]", "mixer.first"])
    config = json.loads((tmp_path / CONFIG).read_text())
    edit_config(tmp_path, alpha_pattern={path: 2 * alpha for path, alpha in config["alpha_pattern"].items()})
    method = read_adapter(tmp_path).method
    assert isinstance(method, LoRA)
    assert [method.scale_at(path) for path in ("qkv[0:4]", "qkv[8:12]", "mixer.first")] == [10 / 3, 10 / 3, 5 / 3]
    assert method.rank_at("qkv[8:12]") == 3


def test_rounding_keeps_rows_and_options(tmp_path: Path) -> None:
    state = rounded(shaken(layers(), METHOD, ["qkv[0:4]", "conv"]).state(), torch.bfloat16)
    write_adapter(state, tmp_path)
    assert state.sites["qkv[0:4]"].runs == ((0, 4),)
    assert_same(read_adapter(tmp_path), state)


def test_a_grouped_convolution_says_what_it_is(tmp_path: Path) -> None:
    saved(tmp_path, ["conv"])
    notes = json.loads(read_tensors(tmp_path / TENSORS).metadata["lorakit.layers"])
    assert notes == {
        "conv": {"kind": "conv2d", "shape": [6, 2, 3, 3], "rank": 3, "options": {"groups": 2}, "own": True}
    }


def test_saving_mentions_what_peft_will_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorakit"):
        saved(tmp_path, ["qkv", "conv", "lstm.weight_ih_l0"])
    assert "it cannot compute such an update of 'lstm.weight_ih_l0', 'conv'" in caplog.text


def test_the_config_keeps_short_names_of_modules_and_of_parameters(tmp_path: Path) -> None:
    saved(tmp_path, ["qkv[0:4]", "mixer.gate_up_proj", "mixer.down_proj"])
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["qkv"]
    assert config["target_parameters"] == ["mixer.down_proj", "mixer.gate_up_proj"]


def test_the_order_of_parameters_is_the_modules(tmp_path: Path) -> None:
    state = saved(tmp_path, ["mixer.first", "mixer.second"])
    assert list(state.sites) == ["mixer.second", "mixer.first"]
    tensors = read_tensors(tmp_path / TENSORS).tensors
    assert tensors[f"{PREFIX}mixer.base_layer.lora_A.weight"].shape == (9, 6)
    assert tensors[f"{PREFIX}mixer.lora_A.weight"].shape == (3, 6)


def test_an_outline_has_every_kind_of_layer(tmp_path: Path) -> None:
    saved(tmp_path, ["qkv[8:12]", "attention.in_proj_weight", "lstm.weight_hh_l0", "conv", "mixer.down_proj"])
    shapes = {
        layer.path: (layer.kind, layer.d_out, layer.d_in, layer.rank) for layer in describe_adapter(tmp_path).layers
    }
    assert shapes == {
        "attention.in_proj_weight": ("attention", 24, 8, 3),
        "conv": ("conv2d", 6, 18, 3),
        "lstm.weight_hh_l0": ("recurrent", 16, 4, 3),
        "mixer.down_proj": ("parameter", 6, 4, 3),
        "qkv[8:12]": ("transposed", 4, 6, 3),
    }


# Refused --------------------------------------------------------------------------------------------


def test_pefts_grouped_convolution_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="groups > 1"):
        by_peft(tmp_path, target_modules=["conv"])
    with pytest.raises(FormatError, match=r"(?s)'conv': .* convolution with 2 groups.*PEFT cannot merge it either"):
        read_adapter(tmp_path)


def test_a_target_parameter_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    by_peft(tmp_path, target_parameters=["mixer.first", "other.second"])
    with pytest.raises(FormatError, match=r"'target_parameters' name 'other.second', of which the file has nothing"):
        read_adapter(tmp_path)


def test_more_names_than_updates_are_named(tmp_path: Path) -> None:
    by_peft(tmp_path, target_parameters=["mixer.first", "mixer.third"])
    with pytest.raises(
        FormatError, match=r"'mixer' has 1 update of its parameters.* allow 'first', 'third': name exactly"
    ):
        read_adapter(tmp_path)


def test_parameters_of_unknown_order_are_named(tmp_path: Path) -> None:
    by_peft(tmp_path, target_parameters=["first", "second"])
    with pytest.raises(FormatError, match=r"'mixer' has 2 updates of its parameters, and which of 'first', 'second'"):
        read_adapter(tmp_path)


def test_a_parameter_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    saved(tmp_path, ["mixer.first"])
    model = layers()
    del model.mixer.first
    with pytest.raises(TargetError, match=r"has a layer 'mixer\.first' that this model lacks"):
        load_adapter(model, tmp_path, check_base=False)


def test_another_split_of_a_projection_is_named(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    def model(heads: int) -> nn.Module:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 29}
        torch.manual_seed(7)
        return GPTNeoXModel(GPTNeoXConfig(**sizes, num_attention_heads=heads))

    save_adapter(attach(model(2), METHOD, "query_key_value[q,v]"), tmp_path)
    load_adapter(model(2), tmp_path)
    with pytest.raises(
        ShapeError, match=r"another split .*query_key_value': its part 'q' is rows 0:8, 24:32, here 0:4"
    ):
        load_adapter(model(4), tmp_path)


def test_pefts_doubled_update_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_peft(tmp_path, target_modules=["attention"])
    with caplog.at_level(logging.WARNING, "lorakit"):
        read_adapter(tmp_path)
    assert "'attention.out_proj': PEFT up to 0.21.2 adds this update twice" in caplog.text


def test_an_attention_of_a_later_peft_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path, target_modules=["attention"])
    edit_config(tmp_path, peft_version="0.22.0")
    with pytest.raises(FormatError, match=r"'attention.out_proj' was trained with PEFT 0.22.0, and whether .* twice"):
        read_adapter(tmp_path)


EDITS: dict[str, tuple[list[str], Callable[[dict[str, Tensor]], Any], str]] = {
    "numbers outside the parts": (
        ["qkv[0:4]"],
        lambda t: t[f"{PREFIX}qkv.lora_B.weight"].add_(1),
        "'qkv' has numbers outside the parts",
    ),
    "ranks that are not there": (
        ["qkv[0:4]"],
        lambda t: t.update({k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in t.items()}),
        "'qkv': the file's own notes name ranks or rows",
    ),
    "numbers where nothing is adapted": (
        ["attention.in_proj_weight"],
        lambda t: t[f"{PREFIX}attention.base_layer.out_proj.lora_B.weight"].add_(1),
        "'attention.out_proj' has numbers, but the file says that it is not adapted",
    ),
    "a projection of another size": (
        ["attention.in_proj_weight"],
        lambda t: t.update({f"{PREFIX}attention.lora_B.weight": torch.ones(16, 3)}),
        r"'attention.in_proj_weight': A \(3, 8\) and B \(16, 3\) are no update of an attention's projection",
    ),
    "a stack without B": (
        ["mixer.second", "mixer.first"],
        lambda t: t.pop(f"{PREFIX}mixer.base_layer.lora_B.weight"),
        "'mixer.second' has no lora_B",
    ),
    "ranks that are no multiple": (
        ["mixer.down_proj"],
        lambda t: t.update({k: v[:8] if "lora_A" in k else v[:, :8].contiguous() for k, v in t.items()}),
        "has 8 ranks of all experts, the config says 3 for each",
    ),
    "a gate with NaN": (
        ["lstm.weight_ih_l0"],
        lambda t: t[f"{PREFIX}lstm.weight_ih_l0.lora_A.weight"].fill_(torch.nan),
        "'lstm.weight_ih_l0' contains NaN",
    ),
    "a gate whose pair disagrees": (
        ["lstm.weight_ih_l0"],
        lambda t: t.update({f"{PREFIX}lstm.weight_ih_l0.lora_B.weight": torch.ones(16, 2)}),
        "'lstm.weight_ih_l0': A .* and B .* disagree on the rank",
    ),
    "a gate that is missing": (
        ["lstm"],
        lambda t: [t.pop(key) for key in list(t) if "weight_hh" in key],
        r"(?s)'lstm.weight_hh_l0' has no lora_A.*'lstm.weight_hh_l0' has no lora_B",
    ),
    "a wrapper too many": (
        ["qkv"],
        lambda t: t.update({f"{PREFIX}qkv.base_layer.lora_A.weight": torch.ones(3, 6)}),
        "'qkv' has an update inside its 'base_layer'",
    ),
    "two broken layers": (
        ["lstm.weight_ih_l0", "mixer.first"],
        lambda t: [t.pop(key) for key in list(t) if "lora_A" in key],
        r"(?s)2 problems.*'lstm.weight_ih_l0' has no lora_A.*'mixer.first' has no lora_A",
    ),
}


@pytest.mark.parametrize(("targets", "change", "message"), EDITS.values(), ids=EDITS.keys())
def test_tensors_that_do_not_fit_the_notes_are_refused_by_name(
    targets: list[str], change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    files = PeftFormat().encode(shaken(layers(), METHOD, targets).state())
    content = files[TENSORS]
    assert isinstance(content, TensorFile)
    tensors = {key: tensor.clone() for key, tensor in content.tensors.items()}
    change(tensors)
    with pytest.raises(FormatError, match=message):
        PeftFormat().decode({**files, TENSORS: TensorFile(tensors, content.metadata)})


def test_a_bias_that_belongs_to_nothing_is_named(tmp_path: Path) -> None:
    saved(tmp_path, ["mixer.first"], METHOD.replaced(bias="all"))
    edit_tensors(tmp_path, lambda t: t.update({f"{PREFIX}mixer.base_layer.second_bias": torch.ones(3, 8)}))
    with pytest.raises(FormatError, match=r"'mixer\.second_bias' is not understood"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "note", ["{", "[1]", '{"qkv[0:4]": {}}', '{"qkv[0:4]": {"kind": "linear", "shape": 3, "rank": 3}}']
)
def test_damaged_notes_are_refused(note: str) -> None:
    files = PeftFormat().encode(shaken(layers(), METHOD, ["qkv[0:4]"]).state())
    content = files[TENSORS]
    assert isinstance(content, TensorFile)
    metadata = {**content.metadata, "lorakit.layers": note}
    with pytest.raises(FormatError, match="metadata of the tensors is damaged"):
        PeftFormat().decode({**files, TENSORS: TensorFile(content.tensors, metadata)})


def test_a_missing_bias_of_an_unadapted_layer_is_named() -> None:
    state = shaken(layers(), METHOD.replaced(bias="all"), ["qkv"]).state()
    files = PeftFormat().encode(state)
    content = files[TENSORS]
    assert isinstance(content, TensorFile)
    kept = {key: tensor for key, tensor in content.tensors.items() if "bias_hh_l0" not in key}
    with pytest.raises(FormatError, match=r"the trained bias of 'lstm\.weight_hh_l0' is missing"):
        PeftFormat().decode({**files, TENSORS: TensorFile(kept, content.metadata)})


def test_a_bias_that_is_rows_of_one_keeps_its_own_name() -> None:
    sites = {"x[0:2]": SiteState("linear", (4, 3), {"A": torch.ones(1, 3), "B": torch.ones(2, 1)}, ((0, 2),))}
    state = AdapterState(LoRA(rank=1, bias="lora_only"), sites, {"x[0:2]": torch.ones(2)}, targets=("x[0:2]",))
    assert_same(PeftFormat().decode(PeftFormat().encode(state)), state)
