"""PEFT's folder format: what is written is read back bit for bit, and nothing is lost in silence."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.adapters import AdapterState, SiteState
from lorakit.adapters.identity import Identity
from lorakit.errors import FormatError
from lorakit.formats import PeftFormat, find_format, read_adapter
from lorakit.formats.peft import CONFIG, PICKLE, TENSORS
from lorakit.formats.store import rounded, write_adapter
from lorakit.formats.tensors import TensorFile, read_tensors, write_tensors
from lorakit.methods import Method
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA

from .models import build, shaken

PREFIX = "base_model.model."

# What PEFT 0.5 already knew; any further field is written only where it says something.
OLD_FIELDS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "bias", "fan_in_fan_out", "inference_mode", "modules_to_save", "init_lora_weights"),
}

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4, alpha=6, dropout=0.25),
    "dora": DoRA(rank=4, alpha=6),
    "rslora": LoRA(rank=4, alpha=6, scaling="rslora", init="gaussian"),
    "patterns": LoRA(rank=4, alpha=6, rank_pattern={"[^.]*[qcwf][^.]*": 3}, alpha_pattern={".*[qwf].*": 9, ".*": 5}),
    "bias": LoRA(rank=4, alpha=6, bias="all"),
}

KINDS: dict[str, tuple[str, list[str], list[str]]] = {
    "linear": ("bert", ["query", "dense"], ["classifier"]),
    "transposed": ("gpt2", ["c_attn", "c_proj"], ["score"]),
    "transposed-and-linear": ("gpt2", ["c_attn", "score"], []),
    "embedding": ("bert", ["word_embeddings", "position_embeddings"], []),
    "conv2d": ("conv", ["first", "second"], ["classifier"]),
}


def assert_same(found: AdapterState, expected: AdapterState, scaled_embeddings: bool = True) -> None:
    """Compare two states bit for bit; only a model tells an embedding from a scaled one."""

    def bits(tensors: Any) -> dict[str, tuple[torch.dtype, bytes, tuple[int, ...]]]:
        return {
            name: (t.dtype, t.contiguous().flatten().view(torch.uint8).numpy().tobytes(), tuple(t.shape))
            for name, t in tensors.items()
        }

    plain = {"sites", "biases", "modules", "parts"}
    for field in dataclasses.fields(AdapterState):
        if field.name not in plain:
            assert getattr(found, field.name) == getattr(expected, field.name)
    assert set(found.sites) == set(expected.sites)
    for path, site in expected.sites.items():
        kind = site.kind if scaled_embeddings else site.kind.removeprefix("scaled_")
        expected_site = dataclasses.replace(site, kind=kind, tensors={})
        assert dataclasses.replace(found.sites[path], tensors={}) == expected_site
        assert bits(found.sites[path].tensors) == bits(site.tensors)
    assert bits(found.biases) == bits(expected.biases)
    assert set(found.modules) == set(expected.modules)
    for path, tensors in expected.modules.items():
        assert bits(found.modules[path]) == bits(tensors)


def small_state(method: Method | None = None, **changes: Any) -> AdapterState:
    """Return an adapter of two linear layers, without a model."""
    generator = torch.Generator().manual_seed(5)
    sites = {
        path: SiteState(
            "linear",
            (6, 8),
            {"A": torch.randn(4, 8, generator=generator), "B": torch.randn(6, 4, generator=generator)},
        )
        for path in ("block.2.proj", "block.10.proj")
    }
    state = AdapterState(method or LoRA(rank=4, alpha=6), sites, targets=("proj",), base_name="some/base")
    return dataclasses.replace(state, **changes)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Replace the tensors as another program would write them, without our metadata."""
    tensors = {key: tensor.clone() for key, tensor in read_tensors(folder / TENSORS).tensors.items()}
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a small saved adapter."""
    write_adapter(small_state(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_decoding_what_was_encoded_gives_the_same_bits(method: str, kind: str) -> None:
    name, targets, train = KINDS[kind]
    model, _ = build(name)
    chosen = METHODS[method]
    chosen = chosen.replaced(rank=2) if kind == "transposed-and-linear" else chosen
    if kind == "embedding" and method == "bias":
        targets = [*targets, "query"]
    state = shaken(model, chosen, targets, train_modules=train).state()
    state = dataclasses.replace(state, base_name="some/base", targets=tuple(sorted(state.targets)))

    assert_same(PeftFormat().decode(PeftFormat().encode(state)), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_keeps_the_dtype_of_the_state(dtype: torch.dtype, tmp_path: Path) -> None:
    state = rounded(small_state(), dtype)
    write_adapter(state, tmp_path)
    assert_same(read_adapter(tmp_path), state)


def test_the_identity_of_the_base_travels_in_the_metadata(tmp_path: Path) -> None:
    identity = Identity("0" * 32, "AAAA", "fp32", ("head",), 3, 120)
    write_adapter(small_state(identity=identity), tmp_path)
    assert read_adapter(tmp_path).identity == identity
    assert read_tensors(tmp_path / TENSORS).metadata["format"] == "pt"


def test_a_plain_adapter_has_only_the_fields_that_old_peft_accepts(folder: Path) -> None:
    assert set(json.loads((folder / CONFIG).read_text())) == OLD_FIELDS


def test_the_config_is_sorted_and_ends_with_a_newline(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == ["proj"]
    assert config["modules_to_save"] is None
    assert isinstance(config["lora_alpha"], int)
    assert config["inference_mode"] is True


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import torch\n"
        "from lorakit.adapters import AdapterState, SiteState\n"
        "from lorakit.adapters.identity import Identity\n"
        "from lorakit.formats.store import write_adapter\n"
        "from lorakit.methods.lora import LoRA\n"
        "sites = {p: SiteState('linear', (3, 2), {'A': torch.ones(1, 2), 'B': torch.ones(3, 1)}) for p in 'abcdef'}\n"
        "identity = Identity('0' * 32, 'AAAA', 'fp32', ('head',), 3, 120)\n"
        "targets, full = tuple(set('abcdef')), tuple({'x', 'y', 'z'})\n"
        "modules = {name: {'weight': torch.ones(2)} for name in full}\n"
        "rest = dict(modules=modules, targets=targets, full_modules=full, identity=identity)\n"
        "state = AdapterState(LoRA(rank=1), sites, **rest)\n"
        "write_adapter(state, sys.argv[1])\n"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=environment)
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_config_of_nothing_but_its_type_has_pefts_defaults(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    edit_tensors(folder, lambda t: t.update({k: torch.ones(8, 8) for k in t}))
    state = read_adapter(folder)
    assert state.method == LoRA(rank=8, alpha=8)
    assert state.targets == ("block.10.proj", "block.2.proj")
    assert state.base_name is None
    assert state.identity is None


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix(PREFIX).replace(".weight", ".my_adapter.weight"),
    ],
    ids=["without-prefix", "with-default", "with-a-name"],
)
def test_older_spellings_of_keys_are_understood(folder: Path, rename: Callable[[str], str]) -> None:
    expected = read_adapter(folder)
    edit_tensors(folder, lambda t: [t.update({rename(key): t.pop(key)}) for key in list(t)])
    assert_same(read_adapter(folder), expected)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight"])
def test_the_magnitude_is_found_under_its_old_names(tmp_path: Path, suffix: str) -> None:
    sites = {
        path: dataclasses.replace(site, tensors={**site.tensors, "magnitude": torch.rand(6)})
        for path, site in small_state().sites.items()
    }
    state = small_state(DoRA(rank=4, alpha=6), sites=sites)
    write_adapter(state, tmp_path)
    old = "lora_magnitude_vector"
    edit_tensors(tmp_path, lambda t: [t.update({k + suffix: t.pop(k)}) for k in list(t) if k.endswith(old)])
    assert_same(read_adapter(tmp_path), state)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["proj"], ("proj",)),
        (r".*\.proj", ("block.10.proj", "block.2.proj")),
        ("all-linear", ("block.10.proj", "block.2.proj")),
        (["proj", "absent"], ("block.10.proj", "block.2.proj")),
        (["block.2.proj"], ("block.10.proj", "block.2.proj")),
        (None, ("block.10.proj", "block.2.proj")),
    ],
)
def test_targets_always_mean_the_sites_in_the_file(folder: Path, targets: Any, expected: tuple[str, ...]) -> None:
    edit_config(folder, target_modules=targets)
    assert read_adapter(folder).targets == expected


def test_a_full_weight_that_the_config_does_not_name_is_a_module_trained_in_full(folder: Path) -> None:
    weight = torch.randn(3, 8)
    edit_tensors(folder, lambda t: t.update({f"{PREFIX}score.weight": weight}))
    state = read_adapter(folder)
    assert state.full_modules == ("score",)
    assert torch.equal(state.modules["score"]["weight"], weight)


def test_modules_to_save_are_found_by_pefts_rule(folder: Path) -> None:
    named = {f"{PREFIX}roberta.classifier.{k}": torch.randn(3) for k in ("dense.weight", "dense.bias", "out.buffer")}
    edit_tensors(folder, lambda t: t.update(named))
    edit_config(folder, modules_to_save=["classifier", "score"])
    state = read_adapter(folder)
    assert state.full_modules == ("roberta.classifier",)
    assert {path: set(tensors) for path, tensors in state.modules.items()} == {
        "roberta.classifier.dense": {"weight", "bias"},
        "roberta.classifier.out": {"buffer"},
    }


def test_an_edited_config_counts_and_is_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, lora_alpha=32)
    with caplog.at_level(logging.WARNING, "lorakit"):
        state = read_adapter(folder)
    assert state.method == LoRA(rank=4, alpha=32)
    assert "was changed after saving ('lora_alpha')" in caplog.text


def test_a_method_of_a_newer_version_is_read_as_its_config_says(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = read_tensors(folder / TENSORS)
    write_tensors(folder / TENSORS, TensorFile(content.tensors, {"lorakit.method": '{"name": "superlora"}'}))
    with caplog.at_level(logging.WARNING, "lorakit"):
        assert read_adapter(folder).method == LoRA(rank=4, alpha=6)
    assert "superlora" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"brand_new_feature": 3}, "brand_new_feature.*not known here"),
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'; LORA"),
        ({"init_lora_weights": "pissa"}, "started from a changed base.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "started from a changed base"),
        ({"init_lora_weights": "olora"}, "started from a changed base"),
        ({"init_lora_weights": "corda"}, "started from a changed base"),
        ({"init_lora_weights": "lora_ga"}, "started from a changed base"),
        ({"init_lora_weights": "loftq"}, "started from a changed base"),
        ({"r": "eight"}, "rank"),
        ({"lora_alpha": None}, "alpha"),
        ({"target_modules": [1]}, "'target_modules' must be a list of names"),
        ({"r": 16}, "has rank 4, the config says 16"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(FormatError, match=rf"(?s){message}"):
        read_adapter(folder)


def test_everything_unsupported_in_a_config_is_named_at_once(folder: Path) -> None:
    edit_config(folder, use_qalora=True, lora_bias=True, init_lora_weights="pissa")
    with pytest.raises(FormatError, match=r"(?s)3 problems.*lora_bias.*use_qalora.*init_lora_weights"):
        read_adapter(folder)


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_a_field_that_is_off_is_no_obstacle(folder: Path, value: Any) -> None:
    edit_config(folder, brand_new_feature=value, use_qalora=value)
    assert len(read_adapter(folder).sites) == 2


A_KEY, B_KEY = f"{PREFIX}block.2.proj.lora_A.weight", f"{PREFIX}block.2.proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B_KEY), "'block.2.proj' has no lora_B"),
        (lambda t: t.update({A_KEY: torch.ones(3, 8)}), "disagree on the rank"),
        (lambda t: t.update({A_KEY: torch.empty(0)}), r"is empty \(0,\): a shard of ZeRO-3.*Gather"),
        (lambda t: t.update({A_KEY: torch.full((4, 8), torch.nan)}), "NaN"),
        (lambda t: t.update({A_KEY: torch.ones(4, 8, dtype=torch.int8)}), "floating-point"),
        (lambda t: t.update({A_KEY: torch.ones(4, 8, 1)}), "no kind of layer that is supported"),
        (lambda t: t.update({f"{PREFIX}strange": torch.ones(2)}), "'strange' is not understood"),
        (lambda t: t.update({f"{PREFIX}norm.bias": torch.ones(2)}), "norm.bias' is not understood"),
        (lambda t: t.update({f"{PREFIX}x.lora_diag": torch.ones(2)}), "lora_diag' is not understood"),
        (lambda t: t.update({f"{PREFIX}x.lora_B.bias": torch.ones(2)}), "lora_bias"),
        (lambda t: t.update({f"{PREFIX}x.base_layer.lora_A.weight": torch.ones(2, 2)}), "target_parameters"),
        (lambda t: t.update({f"{PREFIX}block.2.proj.weight": torch.ones(6, 8)}), "an update and a weight"),
        (lambda t: t.update({f"{PREFIX}block.2.proj.lora_magnitude_vector": torch.ones(6)}), "does not have"),
        (lambda t: t.update({A_KEY.removeprefix(PREFIX): torch.ones(4, 8)}), "there twice"),
        (lambda t: t.update({A_KEY.replace("A.weight", "A.other.weight"): t.pop(A_KEY),
                             B_KEY.replace("B.weight", "B.one.weight"): t.pop(B_KEY)}), "several adapters"),
        (lambda t: t.clear(), "no tensor of an adapter"),
    ],
)  # fmt: skip
def test_tensors_that_make_no_sense_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(FormatError, match=rf"(?s){message}"):
        read_adapter(folder)


def test_every_broken_tensor_is_named_at_once(folder: Path) -> None:
    edit_tensors(folder, lambda t: (t.pop(B_KEY), t.update({"what": torch.ones(1)})))
    with pytest.raises(FormatError, match=r"(?s)2 problems.*has no lora_B.*'what' is not understood"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 8}'])
def test_a_config_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(FormatError, match=CONFIG):
        read_adapter(folder)


def test_a_folder_with_a_pickle_only_says_how_to_convert_it(folder: Path) -> None:
    torch.save(dict(read_tensors(folder / TENSORS).tensors), folder / PICKLE)
    (folder / TENSORS).unlink()
    with pytest.raises(FormatError, match=r"can run code.*weights_only=True"):
        read_adapter(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))], ids=["zip", "pickle"]
)
def test_a_pickle_under_a_safetensors_name_is_never_opened(folder: Path, save: Callable[[Any, Path], Any]) -> None:
    (folder / TENSORS).unlink()
    save({"x": Bomb(folder / "exploded")}, folder / TENSORS)
    with pytest.raises(FormatError, match="is a pickle under a safetensors name"):
        read_adapter(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"some text that is no tensor file", "is not a safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_a_file_that_was_cut_off_is_refused(folder: Path, kept: float) -> None:
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(FormatError, match=TENSORS):
        read_adapter(folder)


def test_a_folder_without_config_says_what_is_missing(folder: Path) -> None:
    (folder / CONFIG).unlink()
    with pytest.raises(FormatError, match="rank and alpha stand only there"):
        read_adapter(folder)


def test_a_folder_that_holds_adapters_in_its_folders_names_them(tmp_path: Path) -> None:
    write_adapter(small_state(), tmp_path / "poet")
    with pytest.raises(FormatError, match="Its folders 'poet' hold adapters"):
        find_format(tmp_path)


@pytest.mark.parametrize(("name", "message"), [("absent", "does not exist"), (CONFIG, "is a file")])
def test_a_place_that_is_no_folder_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_adapter(folder / name)


@pytest.mark.parametrize(
    ("changes", "task_type", "message"),
    [
        ({"biases": {"norm": torch.ones(2)}}, None, "method says bias='none'"),
        ({"parts": {"prompt": {"table": torch.ones(2)}}}, None, "parts that belong to no layer"),
        ({}, "SEQ_CLS", "means a trained head"),
        ({}, "seq_cls", "no task type 'seq_cls'"),
    ],
)
def test_what_pefts_format_cannot_say_is_refused(changes: dict[str, Any], task_type: str | None, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        PeftFormat(task_type=task_type).encode(small_state(**changes))


def test_a_tensor_that_peft_has_no_name_for_is_refused() -> None:
    tensors = {**small_state().sites["block.2.proj"].tensors, "gain": torch.ones(4)}
    with pytest.raises(FormatError, match="no name for the tensor 'gain' of layer 'x'"):
        PeftFormat().encode(small_state(sites={"x": SiteState("linear", (6, 8), tensors)}, targets=("x",)))


def test_a_kind_of_layer_that_came_later_is_kept_in_our_own_form() -> None:
    odd = {"x": SiteState("quaternion", (2, 2), {"A": torch.ones(4, 2), "B": torch.ones(2, 4)})}
    state = small_state(sites=odd, targets=("x",))
    files = PeftFormat().encode(state)
    assert isinstance(files[CONFIG], str)
    assert json.loads(files[CONFIG])["peft_type"] == "LORAKIT"
    assert_same(PeftFormat().decode(files), state)


def test_patterns_whose_order_matters_survive_sorting_by_exact_paths() -> None:
    """The file's keys are sorted, and PEFT takes the first key that matches."""
    method = LoRA(rank=4, alpha=6, alpha_pattern={"block.2.proj": 3, ".*proj": 12})
    state = small_state(method)
    files = PeftFormat().encode(state)
    assert isinstance(files[CONFIG], str)
    assert json.loads(files[CONFIG])["alpha_pattern"] == {r"block\.10\.proj": 12, r"block\.2\.proj": 3}
    assert PeftFormat().decode(files).method == method


def test_a_path_that_ends_another_path_gets_a_pattern_of_its_own() -> None:
    pair = small_state().sites["block.2.proj"]
    narrow = SiteState("linear", (6, 8), {"A": torch.ones(2, 8), "B": torch.ones(6, 2)})
    state = small_state(sites={"proj": narrow, "a.proj": pair})
    files = PeftFormat().encode(state)
    assert isinstance(files[CONFIG], str)
    assert json.loads(files[CONFIG])["rank_pattern"] == {"^proj": 2}
    method = PeftFormat().decode(files).method
    assert isinstance(method, LoRA)
    assert [method.rank_at(path) for path in state.sites] == [2, 4]
    assert [method.scale_at(path) for path in state.sites] == [3.0, 1.5]


def test_a_real_adapter_is_decoded(shared: Path) -> None:
    place = shared / "adapters" / "gpt2-peft"
    if not place.is_dir():
        pytest.skip("the shared input has no adapter 'gpt2-peft'")
    state = read_adapter(place)
    assert state.method == LoRA(rank=8, alpha=8)
    assert list(state.sites) == [f"transformer.h.{i}.attn.c_attn" for i in range(12)]
    assert {(site.kind, site.weight_shape) for site in state.sites.values()} == {("transposed", (768, 2304))}
    assert state.targets == ("c_attn",)
    assert state.full_modules == ("score",)
    assert tuple(state.modules["score"]["weight"].shape) == (6, 768)
    assert state.base_name == "gpt2"
    assert state.identity is None
