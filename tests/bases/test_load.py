from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakit.adapters.identity import compare, identify
from lorakit.bases import context_length, is_chat_model, load_base
from lorakit.errors import ConfigError, FormatError, ModelError

Saved = Callable[..., Path]
LABELS = ("yes", "no", "maybe")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "task", "model_class", "new_modules"),
    [
        ("bert", "classification", "BertForSequenceClassification", ("bert.pooler", "classifier")),
        ("bert", "features", "BertModel", ("pooler",)),
        ("roberta", "classification", "RobertaForSequenceClassification", ("classifier",)),
        ("llama", "generation", "LlamaForCausalLM", ()),
        ("llama", "classification", "LlamaForSequenceClassification", ("score",)),
        ("llama", "features", "LlamaModel", ()),
        ("gpt2", "language-modeling", "GPT2LMHeadModel", ()),
        ("t5", "generation", "T5ForConditionalGeneration", ()),
        ("t5", "classification", "T5ForSequenceClassification", ("classification_head",)),
    ],
)
def test_task_chooses_the_class_and_names_what_is_new(
    saved: Saved, kind: str, task: str, model_class: str, new_modules: tuple[str, ...]
) -> None:
    base = load_base(saved(kind), task, labels=LABELS)
    assert type(base.model).__name__ == model_class
    assert base.new_modules == new_modules


def test_minilm_as_a_classifier_has_one_new_module(minilm: Path) -> None:
    base = load_base(minilm, "classification", labels=LABELS)
    assert base.new_modules == ("classifier",)
    assert base.model.config.id2label == dict(enumerate(LABELS))
    assert base.name == str(minilm)
    assert base.revision is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_minilm_is_the_same_base_in_every_dtype(minilm: Path, dtype: str) -> None:
    whole = identify(load_base(minilm, "features", dtype="fp32").model)
    assert compare(whole, load_base(minilm, "features", dtype=dtype).model) is None


def test_minilm_with_one_percent_noise_is_another_base(minilm: Path) -> None:
    model = load_base(minilm, "features").model
    before = identify(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.01 * parameter.abs().mean() * noise)
    found = compare(before, model)
    assert found is not None
    assert found.kind == "weights"


def test_model_comes_frozen_and_in_eval_mode(saved: Saved) -> None:
    model = load_base(saved("bert"), "classification", labels=LABELS).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_new_head_depends_on_the_seed_alone(saved: Saved) -> None:
    folder = saved("bert")
    heads = []
    for seed in (1, 1, 2):
        torch.rand(3)
        heads.append(load_base(folder, "classification", labels=LABELS, seed=seed).model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_loading_leaves_the_random_state_alone(saved: Saved) -> None:
    folder = saved("bert")
    before = torch.get_rng_state()
    load_base(folder, "classification", labels=LABELS)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_prints_nothing_and_restores_verbosity(saved: Saved, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved("bert")
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_base(folder, "classification", labels=LABELS)
    assert capfd.readouterr() == ("", "")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_dtype_word_is_obeyed(saved: Saved, dtype: str, expected: torch.dtype) -> None:
    assert load_base(saved("llama"), "generation", dtype=dtype).model.dtype == expected


def test_auto_dtype_is_the_checkpoints(saved: Saved, tmp_path: Path) -> None:
    half = load_base(saved("llama"), "generation", dtype="bf16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    assert load_base(tmp_path / "half", "generation").model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoder_without_padding_pads_with_end_of_text(saved: Saved, kind: str) -> None:
    base = load_base(saved(kind, eos_token="</s>"), "classification", labels=LABELS)
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == 1
    batch = base.tokenizer(["word1 word2 word3", "word4"], padding=True, return_tensors="pt")
    logits = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (2, len(LABELS))


def test_decoder_without_any_token_to_pad_with_cannot_classify(saved: Saved) -> None:
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        load_base(saved("gpt2", bos_token="<unk>"), "classification", labels=LABELS)


@pytest.mark.parametrize("task", ["generation", "language-modeling"])
def test_encoder_cannot_write_text(saved: Saved, task: str) -> None:
    with pytest.raises(ModelError, match=rf"encoder-only model \(bert\).*cannot do {task}.*'classification'"):
        load_base(saved("bert"), task)


def test_head_of_another_size_is_replaced(saved: Saved) -> None:
    base = load_base(saved("bert-classifier"), "classification", labels=LABELS)
    assert base.new_modules == ("classifier",)
    assert base.model.classifier.weight.shape == (3, 16)


def test_head_that_fits_is_kept(saved: Saved) -> None:
    folder = saved("bert-classifier")
    base = load_base(folder, "classification")
    assert base.new_modules == ()
    assert torch.equal(base.model.classifier.weight, load_file(folder / "model.safetensors")["classifier.weight"])


def test_tensor_missing_in_the_body_is_named(saved: Saved) -> None:
    folder = saved("llama")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit_weights(folder, drop)
    with pytest.raises(ModelError, match=r"lacks 1 tensors of the body.*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_base(folder, "generation")


def test_weights_that_do_not_fit_the_config_are_named(saved: Saved) -> None:
    folder = saved("llama")
    edit_config(folder, intermediate_size=32)
    with pytest.raises(ModelError, match=r"does not fit its config.*down_proj.*\[16, 24\] in the file, \[16, 32\]"):
        load_base(folder, "generation")


def test_nan_in_the_weights_is_named(saved: Saved) -> None:
    folder = saved("llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    edit_weights(folder, spoil)
    with pytest.raises(ModelError, match=r"1 weights .* contain NaN or infinity: 'model\.norm\.weight'"):
        load_base(folder, "generation")


def test_missing_folder_names_its_neighbours(saved: Saved) -> None:
    folder = saved("llama")
    with pytest.raises(ModelError, match=r"no model folder.*Closest: 'llama'"):
        load_base(folder.parent / "lama", "generation")


def test_file_instead_of_a_folder_is_refused(saved: Saved) -> None:
    with pytest.raises(ModelError, match="is a file, not a model folder"):
        load_base(saved("llama") / "model.safetensors", "generation")


def test_adapter_instead_of_a_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load_base(tmp_path, "generation")


def test_folder_without_config_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"no config\.json \(it has 'notes\.txt'\)"):
        load_base(tmp_path, "generation")


def test_pickled_weights_are_refused_by_name(saved: Saved) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"as a pickle only: 'pytorch_model\.bin'.*save_pretrained"):
        load_base(folder, "generation")


def test_every_broken_json_file_is_named(saved: Saved) -> None:
    folder = saved("llama")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{")
    with pytest.raises(ModelError, match=r"(?s)2 problems.*config\.json' is not valid.*tokenizer\.json' is not valid"):
        load_base(folder, "generation")


def test_folder_without_a_tokenizer_is_refused(saved: Saved) -> None:
    folder = saved("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_base(folder, "generation")


def test_unknown_architecture_names_the_nearest(saved: Saved) -> None:
    folder = saved("llama")
    edit_config(folder, model_type="lama")
    with pytest.raises(ModelError, match=r"of type 'lama', which transformers .* does not know.*'llama'"):
        load_base(folder, "generation")


def test_code_of_a_model_runs_only_when_asked(saved: Saved) -> None:
    folder = saved("llama")
    witness = folder / "it_ran"
    (folder / "own.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    edit_config(folder, model_type="ours", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_base(folder, "generation")
    assert not witness.exists()


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "ours"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_trusted_code_of_a_model_builds_it(saved: Saved) -> None:
    folder = saved("llama")
    (folder / "own.py").write_text(OWN_CODE)
    edit_config(folder, model_type="ours", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    base = load_base(folder, "generation", trust_remote_code=True)
    assert type(base.model).__name__ == "Model"
    assert base.new_modules == ()


def test_revision_of_a_folder_is_refused(saved: Saved) -> None:
    with pytest.raises(ModelError, match="has no revisions"):
        load_base(saved("llama"), "generation", revision="main")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("task", "generaton", "Closest: 'generation'"),
        ("dtype", "float7", "Known: 'auto', 'fp32'"),
        ("device", "gpu", "unknown device 'gpu'"),
    ],
)
def test_unknown_option_is_refused(tmp_path: Path, option: str, value: str, message: str) -> None:
    options = {"task": "generation", option: value}
    with pytest.raises(ConfigError, match=message):
        load_base(tmp_path, **options)


@pytest.mark.parametrize(("kind", "task", "length"), [("roberta", "features", 40), ("gpt2", "generation", 32)])
def test_context_length_is_what_fits(saved: Saved, kind: str, task: str, length: int) -> None:
    base = load_base(saved(kind), task)
    assert context_length(base.model, base.tokenizer) == length
    ids = torch.full((1, length), 5)
    assert base.model(input_ids=ids)[0].shape[1] == length
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=torch.full((1, length + 1), 5))


def test_tokenizers_limit_shortens_the_context(saved: Saved) -> None:
    base = load_base(saved("llama"), "generation")
    base.tokenizer.model_max_length = 20
    assert context_length(base.model, base.tokenizer) == 20


def test_chat_model_is_one_with_a_chat_template(saved: Saved) -> None:
    base = load_base(saved("llama"), "generation")
    assert not is_chat_model(base.tokenizer, base.model)
    base.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert is_chat_model(base.tokenizer, base.model)


OFFLINE = """
import sys
from lorakit.bases import load_base
from lorakit.errors import ModelError
base = load_base("someone/tiny", "generation")
print(type(base.model).__name__, base.name, base.revision)
try:
    load_base("someone/other", "generation")
except ModelError as error:
    print(error)
"""


def test_hub_model_loads_from_the_cache_and_an_absent_one_says_why(saved: Saved, tmp_path: Path) -> None:
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    saved("llama").rename(repository / "snapshots" / commit)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == f"LlamaForCausalLM someone/tiny {commit}"
    assert "'someone/other' is neither a folder here" in second
    assert "HF_HUB_OFFLINE is set" in second
