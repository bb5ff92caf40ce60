"""Looking inside saved adapters of tiny real models: from files alone, with a base, and two at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.adapters import attach
from lorakit.adapters.spectrum import layer_spectra, low_rank_updates
from lorakit.errors import BaseMismatchError, FormatError, InputError, ModelError, RunFolderError, ShapeError
from lorakit.formats.outline import describe_adapter
from lorakit.formats.store import save_adapter
from lorakit.methods import find_method
from lorakit.records import AdapterSpectrum, LayerSpectrum
from lorakit.reports.spectrum_run import read_spectrum

# Two ways of reading one weight: fp32, relative.
SAME = 1e-4


def _llama(seed: int = 0, **fields: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, **{**sizes, "tie_word_embeddings": False, **fields})
    return LlamaForCausalLM(config).eval()


def _gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


@dataclass(frozen=True)
class Saved:
    """A base and an adapter in folders, and what the live model says of the adapter."""

    base: Path
    adapter: Path
    live: tuple[LayerSpectrum, ...]


Save = Callable[..., Saved]


def save_with_tokenizer(model: Any, folder: Path) -> None:
    """Save a model as one that can be loaded again as a base."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return a function that saves a model, adapts it at random and saves the adapter."""

    def saved(
        model: Any,
        targets: Any = "all-linear",
        name: str = "adapter",
        method: str = "lora",
        base: str = "base",
        **fields: Any,
    ) -> Saved:
        if not (tmp_path / base).exists():
            save_with_tokenizer(model, tmp_path / base)
        handle = attach(model, find_method(method, **{"rank": 3, "alpha": 5.0, **fields}), targets, seed=0)
        with torch.no_grad():
            for parameter in handle.parameters().values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        save_adapter(handle, tmp_path / name, base_name=str(tmp_path / base), task_type="CAUSAL_LM")
        live: list[LayerSpectrum] = []
        for path, site, pair in low_rank_updates(handle):
            live += layer_spectra(path, pair, site.matrix(), overlap=True)
        handle.detach()
        return Saved(tmp_path / base, tmp_path / name, tuple(live))

    return saved


def stages(run: Saved, **arguments: Any) -> tuple[AdapterSpectrum, list[str]]:
    """Look inside an adapter; also return what was being done."""
    said: list[str] = []
    return read_spectrum(run.adapter, stage=said.append, **arguments), said


def is_loading(said: list[str]) -> bool:
    return any(text.startswith("loading the base") for text in said)


def figures(layers: tuple[LayerSpectrum, ...]) -> dict[str, list[float]]:
    """Return all numbers of every layer by path."""
    found = {}
    for layer in layers:
        assert layer.overlap is not None
        assert layer.base_norm is not None
        found[layer.path] = [layer.base_norm, *layer.singular_values, *map(float, astuple(layer.overlap))]
    return found


def same_figures(found: AdapterSpectrum, run: Saved) -> bool:
    here, there = figures(found.layers), figures(run.live)
    return here.keys() == there.keys() and all(here[path] == pytest.approx(there[path], rel=SAME) for path in there)


# With and without the base ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_llama, _gpt2], ids=["llama", "gpt2"])
def test_weights_from_the_files_give_what_the_live_model_gives(make: Callable[[], nn.Module], save: Save) -> None:
    run = save(make())
    found, said = stages(run)
    assert not is_loading(said)
    assert same_figures(found, run)
    assert found.base == str(run.base)


def test_shards_are_read_as_well(save: Save, tmp_path: Path) -> None:
    model: Any = _llama()
    run = save(model)
    model.save_pretrained(run.base, max_shard_size="5KB")
    (run.base / "model.safetensors").unlink(missing_ok=True)
    found, said = stages(run)
    assert len(list(run.base.glob("*.safetensors"))) > 1
    assert not is_loading(said)
    assert same_figures(found, run)


@pytest.mark.parametrize("change", ["taken away", "put before"])
def test_a_prefix_that_only_the_model_or_only_the_file_has_is_no_obstacle(change: str, save: Save) -> None:
    run = save(_llama(), "q_proj")
    file = run.base / "model.safetensors"
    tensors = load_file(file)
    rename = (lambda key: key.removeprefix("model.")) if change == "taken away" else (lambda key: f"lm.{key}")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
    found, said = stages(run)
    assert not is_loading(said)
    assert same_figures(found, run)


def test_an_embeddings_weight_is_read_from_the_file(save: Save) -> None:
    run = save(_llama(), ["model.embed_tokens"])
    found, said = stages(run)
    assert not is_loading(said)
    assert same_figures(found, run)


def test_a_tied_weight_that_the_file_has_under_another_name_is_taken_from_the_loaded_model(save: Save) -> None:
    run = save(_llama(tie_word_embeddings=True), ["lm_head"])
    found, said = stages(run)
    assert is_loading(said)
    assert same_figures(found, run)


def test_a_base_without_a_layers_weight_is_refused(save: Save) -> None:
    run = save(_llama(), "q_proj")
    file = run.base / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if "q_proj" not in key}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 2 tensors"):
        read_spectrum(run.adapter)


def test_a_square_weight_of_unknown_orientation_is_taken_from_the_loaded_model(save: Save) -> None:
    run = save(_gpt2(), ["transformer.h.0.attn.c_proj"])
    forget_metadata(run.adapter)
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"fan_in_fan_out": true', '"fan_in_fan_out": false'))
    found, said = stages(run)
    assert is_loading(said)
    assert same_figures(found, run)


def forget_metadata(adapter: Path) -> None:
    """Leave of an adapter what another library would have written."""
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


def test_a_file_that_does_not_name_its_base_is_unverified(save: Save) -> None:
    run = save(_llama(), "q_proj")
    forget_metadata(run.adapter)
    (note,) = read_spectrum(run.adapter).notes
    assert "unverified" in note


def test_without_the_base_all_but_its_figures_is_there(save: Save) -> None:
    run = save(_llama())
    found = read_spectrum(run.adapter, use_base=False)
    values = {layer.path: layer.singular_values for layer in found.layers}
    assert values == {layer.path: pytest.approx(layer.singular_values, rel=SAME) for layer in run.live}
    assert {(layer.base_norm, layer.overlap) for layer in found.layers} == {(None, None)}
    assert found.base is None
    assert found.base_missing is not None


def test_a_base_that_has_moved_is_said_with_what_to_do(save: Save, tmp_path: Path) -> None:
    run = save(_llama(), "q_proj")
    run.base.rename(tmp_path / "elsewhere")
    gone = read_spectrum(run.adapter)
    assert f"'{run.base}' is not there any more" in str(gone.base_missing)
    assert "--base MODEL" in str(gone.base_missing)
    assert same_figures(read_spectrum(run.adapter, base=str(tmp_path / "elsewhere")), run)


def test_a_hub_name_that_is_not_cached_is_not_downloaded_unasked(save: Save) -> None:
    run = save(_llama(), "q_proj")
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(run.base), "someone/no-such-model"))
    assert "'someone/no-such-model' is not on this machine" in str(read_spectrum(run.adapter).base_missing)


def test_the_base_that_was_named_must_be_there(save: Save, tmp_path: Path) -> None:
    run = save(_llama(), "q_proj")
    with pytest.raises(ModelError, match="there is no model folder"):
        read_spectrum(run.adapter, base=str(tmp_path / "no-such-folder"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_stored_in_another_dtype_is_the_same_base(dtype: str, save: Save) -> None:
    run = save(_llama(), "q_proj")
    model: Any = _llama().to(getattr(torch, dtype))
    model.save_pretrained(run.base)
    assert read_spectrum(run.adapter).base == str(run.base)


@pytest.mark.parametrize("change", ["other weights", "fine-tuned a little", "other sizes"])
def test_weights_of_another_base_are_refused(change: str, save: Save) -> None:
    run = save(_llama(), "q_proj")
    other: Any = _llama(seed=1) if change == "other weights" else _llama()
    if change == "fine-tuned a little":
        with torch.no_grad():
            other.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    if change == "other sizes":
        other = _llama(hidden_size=32)
    other.save_pretrained(run.base)
    with pytest.raises(BaseMismatchError, match="belongs to"):
        read_spectrum(run.adapter)


def test_a_broken_weight_file_is_refused(save: Save) -> None:
    run = save(_llama(), "q_proj")
    file = run.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="cut off"):
        read_spectrum(run.adapter)


def test_the_low_rank_part_of_dora_is_shown_and_said_to_be_that(save: Save) -> None:
    run = save(_llama(), "q_proj", method="dora")
    found = read_spectrum(run.adapter)
    assert same_figures(found, run)
    assert [note for note in found.notes if "'dora' also learns 'magnitude'" in note] != []


def test_the_outline_of_an_adapter_has_the_same_values(save: Save) -> None:
    run = save(_llama(), "q_proj", scaling="rslora")
    values = {layer.path: layer.singular_values for layer in describe_adapter(run.adapter).layers}
    assert values == {layer.path: pytest.approx(layer.singular_values, rel=SAME) for layer in run.live}


# Two adapters ----------------------------------------------------------------------------------------


def test_an_adapter_compared_with_itself_is_the_same_everywhere(save: Save) -> None:
    run = save(_llama())
    found = read_spectrum(run.adapter, run.adapter, use_base=False).similarity
    assert found is not None
    assert len(found.layers) == len(run.live)
    assert {round(value, 4) for layer in found.layers for at in layer.at for value in (at.A, at.B, at.inputs)} == {1.0}


def test_layers_that_only_one_has_are_named(save: Save) -> None:
    first, second = save(_llama(), "q_proj,v_proj"), save(_llama(), "q_proj,down_proj", name="second", rank=2)
    found = read_spectrum(first.adapter, second.adapter, use_base=False).similarity
    assert found is not None
    assert [layer.path for layer in found.layers] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert found.only_here == tuple(f"model.layers.{i}.self_attn.v_proj" for i in range(2))
    assert found.only_there == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))


def test_adapters_that_share_no_layer_are_refused(save: Save) -> None:
    first, second = save(_llama(), "q_proj"), save(_llama(), "v_proj", name="second")
    with pytest.raises(InputError, match="share no layer"):
        read_spectrum(first.adapter, second.adapter)


def test_layers_of_other_sizes_are_all_named(save: Save) -> None:
    first = save(_llama(), "q_proj")
    second = save(_llama(hidden_size=32), "q_proj", name="second", base="wider")
    with pytest.raises(ShapeError) as caught:
        read_spectrum(first.adapter, second.adapter)
    assert str(caught.value).count("is 16 x 16 in one adapter and 32 x 32 in the other") == 2


def test_adapters_of_different_bases_are_said_to_be_that(save: Save) -> None:
    first = save(_llama(), "q_proj")
    second = save(_llama(seed=1), "q_proj", name="second", base="other")
    notes = read_spectrum(first.adapter, second.adapter).notes
    assert [note for note in notes if "different bases" in note] != []


# What is no adapter ----------------------------------------------------------------------------------


def test_a_folder_without_an_adapter_is_refused(save: Save) -> None:
    with pytest.raises(RunFolderError, match="It is a model"):
        read_spectrum(save(_llama(), "q_proj").base)


def test_an_adapter_without_a_low_rank_update_is_refused(save: Save) -> None:
    run = save(_llama(), "q_proj")
    file = run.adapter / "adapter_model.safetensors"
    save_file({"base_model.model.lm_head.weight": torch.zeros(40, 16)}, file, {"format": "pt"})
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"modules_to_save": null', '"modules_to_save": ["lm_head"]'))
    with pytest.raises(InputError, match="no low-rank update to look into: it trains modules in full \\('lm_head'\\)"):
        read_spectrum(run.adapter)
