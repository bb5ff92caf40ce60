"""Frozen lower blocks: nothing of them is kept or differentiated; read from disk, they give the same losses."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    RwkvConfig,
)

import lorakit as lk
from lorakit.errors import ConfigError, TrainingError
from lorakit.training.config import TrainConfig, read_config, write_config
from lorakit.training.costs.plan import plan_costs
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import IGNORED, EncodedRow
from lorakit.training.fit import FitResult, fit, resume
from lorakit.training.mode import training_mode
from lorakit.training.observe import Observer, Step
from lorakit.training.packing import PackingCollator
from lorakit.training.prefix.cached import CachedPrefix
from lorakit.training.prefix.find import find_prefix
from lorakit.training.prefix.places import Places, on_disk
from lorakit.training.prefix.trial import tried
from lorakit.training.run_files import read_start
from lorakit.training.spec import TaskSpec

from .tiny import SIZES as TINY

Build = Callable[..., nn.Module]
Tokenizer = Callable[..., Any]
Rows = Callable[..., list[dict[str, Any]]]

SIZES: dict[str, Any] = {**TINY, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4}
SHARING: dict[str, Any] = {**SIZES, "head_dim": 8, "laurel_rank": 4, "hidden_size_per_layer_input": 8}
CLEAN: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "gemma2, a window": Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "mixtral, experts": MixtralConfig(**SIZES, num_local_experts=4),
    "llama4": Llama4TextConfig(
        **SIZES, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4),
    "opt, positions from the mask": OPTConfig(**HEADS, ffn_dim=48, num_attention_heads=4, pad_token_id=0, dropout=0.0),
    "mamba": MambaConfig(**HEADS, state_size=8),
    "rwkv": RwkvConfig(**HEADS, context_length=64),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "gemma3n shares keys and values": (
        Gemma3nTextConfig(
            **SHARING, num_kv_shared_layers=2, vocab_size_per_layer_input=64, activation_sparsity_pattern=None
        ),
        "hand on more than hidden states",
    ),
    "gpt2 with dropout": (GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2), "resid_pdrop 0.1"),
    "layers that are left out by chance": (
        OPTConfig(**HEADS, ffn_dim=48, num_attention_heads=4, pad_token_id=0, dropout=0.0, layerdrop=0.5),
        "not run once each|dropout acts there|not run in every pass",
    ),
}
# The same fp32 sums in another order, through ten steps.
CLOSE = 1e-5


def row(number: int) -> EncodedRow:
    ids = [3 + (7 * number + 5 * place + place * place) % 60 for place in range(7 + 3 * (number % 4))]
    return EncodedRow(ids, [IGNORED] * 3 + ids[3:], number, "", "")


ROWS = [row(number) for number in range(8)]


def model_of(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)  # a trained model's scores tell tokens apart
    return model


def cached_of(model: nn.Module, packing: bool = False, **attaching: Any) -> CachedPrefix:
    """Return what is kept of a model with an adapter on its upper blocks."""
    handle = lk.attach(model, lk.LoRA(rank=2), seed=0, name="default", **{"layers": "last:2", **attaching})
    task = TaskSpec("generation", max_length=64).kind
    padded = task.collator(0)
    batch = padded(ROWS[:3])
    prefix = find_prefix(handle, "default", lambda: task.outputs(model, batch))
    batching = PackingCollator(padded) if packing else padded
    return CachedPrefix(prefix, Places(ROWS, 2), model, task, batching, padded, ROWS)


# Nothing below is kept -----------------------------------------------------------------------------------


class Kept:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_and_run(
    model: nn.Module, below: Sequence[nn.Module], loss: Callable[[], Tensor], checkpointing: bool
) -> tuple[int, int]:
    """Take a step; return how many tensors the graph keeps of lower modules, and how often these run in all."""
    inside: list[nn.Module] = []
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    runs = 0

    def keep(tensor: Tensor) -> Kept:
        found = Kept(tensor)
        if inside:
            kept.add(found)
        return found

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += 1
        inside.append(module)

    hooks = [module.register_forward_pre_hook(enter) for module in below]
    hooks += [module.register_forward_hook(lambda *given: inside.clear()) for module in below]
    with training_mode(model, checkpointing), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        found = loss()
        gc.collect()
        num_kept = len(kept)
        found.backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    return num_kept, runs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_below_the_lowest_adapted_layer_is_kept_or_computed_again(checkpointing: bool) -> None:
    model = model_of(CLEAN["llama"])
    handle = lk.attach(model, lk.LoRA(rank=2), layers="last:1", seed=0)
    task = TaskSpec("generation", max_length=64).kind
    batch = task.collator(0)(ROWS[:4])
    below = [model.model.embed_tokens, *model.model.layers[:3]]  # type: ignore[union-attr, misc, list-item, index]
    embedded: list[Tensor] = []
    hook = below[-1].register_forward_hook(lambda module, args, out: embedded.append(out))
    assert kept_and_run(model, below, lambda: task.loss(model, batch), checkpointing) == (0, len(below))
    hook.remove()
    assert [each.requires_grad for each in embedded] == [False]
    assert all(parameter.grad is not None for parameter in handle.parameters().values())


# What is known of a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", CLEAN)
def test_the_loss_without_the_frozen_blocks_is_the_models_own(kind: str, packing: bool) -> None:
    if packing and kind in ("bloom", "opt, positions from the mask", "mamba", "rwkv"):
        pytest.skip("examples of one sequence see one another in it: it is never packed")
    cached = cached_of(model_of(CLEAN[kind]), packing)
    assert (len(cached.prefix.blocks), cached.prefix.num_blocks) == (2, 4)
    found = tried(cached, ROWS)
    assert found.same == 0
    assert found.alone <= CLOSE
    assert found.holds


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_whose_blocks_do_more_is_refused(kind: str) -> None:
    config, reason = REFUSED[kind]
    with pytest.raises(ConfigError, match=reason):
        cached_of(model_of(config))


def test_a_bf16_model_keeps_bf16_numbers() -> None:
    cached = cached_of(model_of(CLEAN["llama"]).to(torch.bfloat16))
    different = sum(len(ids) for ids in {tuple(each.input_ids) for each in ROWS})
    assert cached.num_bytes == 2 * 32 * different
    assert tried(cached, ROWS).holds


class Remembering(LlamaForCausalLM):  # type: ignore[misc]
    """Adds what its first block gave, too, to what goes into the head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seen: list[Tensor] = []
        hooks = [
            self.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out)),
            self.model.norm.register_forward_hook(lambda module, args, out: out + 5 * seen[0]),
        ]
        try:
            return super().forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()


def test_a_model_that_reads_a_frozen_block_elsewhere_does_not_hold() -> None:
    torch.manual_seed(0)
    found = tried(cached_of(Remembering(CLEAN["llama"])), ROWS)
    assert not found.holds
    assert "The frozen blocks are computed in every pass: in Remembering the loss" in str(found)


# Whole runs ----------------------------------------------------------------------------------------------


class Losses(Observer):
    """Takes down losses and notes; does something in a step."""

    def __init__(self, at: int = 0, do: Callable[[], object] = lambda: None) -> None:
        self.at, self.do = at, do
        self.losses: list[float] = []
        self.notes: list[str] = []

    def step(self, step: Step) -> None:
        self.losses.append(step.loss)
        if step.step == self.at:
            self.do()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def run(tokenizer: Tokenizer, rows_of: Rows) -> Callable[..., tuple[FitResult, Losses]]:
    """Return a function that trains the upper half of a tiny model for two epochs."""

    def trained(rows: str = "prompted", observer: Losses | None = None, **settings: Any) -> tuple[FitResult, Losses]:
        watch = observer or Losses()
        usual: dict[str, Any] = {"epochs": 2, "lr": 5e-3, "batch_size": 8, "validation": 0.2, "layers": "last:2"}
        usual |= {"rank": 4, "seed": 1}
        model = settings.pop("model", None) or model_of(CLEAN["llama"])
        examples = settings.pop("examples", None) or rows_of(rows)
        return fit(model, examples, tokenizer=tokenizer("llama"), observer=watch, **usual | settings), watch

    return trained


def count_runs(block: nn.Module) -> list[int]:
    """Return a list that gets an entry for each time a block really computes."""
    runs: list[int] = []
    block.mlp.register_forward_hook(lambda module, args, out: runs.append(int(out.shape[0])))  # type: ignore[union-attr]
    return runs


CASES: dict[str, dict[str, Any]] = {
    "padded": {"packing": "off"},
    "packed": {"packing": "on"},
    "micro-batches": {"packing": "off", "micro_batch": 3},
    "checkpointed": {"packing": "off", "grad_checkpointing": True},
    "dropout in the adapter": {"packing": "off", "method": {"name": "lora", "rank": 4, "dropout": 0.2}, "rank": None},
    "blocks of text": {"rows": "written", "max_length": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_a_run_that_computes_all(case: str, run: Any) -> None:
    whole = run(**CASES[case])[1].losses
    found, watch = run(**CASES[case], cache_prefix=True)
    assert watch.losses == pytest.approx(whole, rel=CLOSE)
    assert len(whole) >= 8
    choice = next(choice for choice in found.summary.choices if choice.name == "cache_prefix")
    assert choice.value == "on"
    assert "block 2 of the 4 in 'model.layers'" in choice.reason


def test_a_classifiers_frozen_blocks_are_kept_too(rows_of: Rows, tokenizer: Tokenizer) -> None:
    def trained(cache_prefix: bool) -> list[float]:
        torch.manual_seed(0)
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
        sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
        model = BertForSequenceClassification(BertConfig(**sizes, **still, max_position_embeddings=64))
        watch = Losses()
        fit(
            model,
            rows_of("classified"),
            tokenizer=tokenizer("bert"),
            observer=watch,
            epochs=2,
            layers="last:2",
            batch_size=8,
            cache_prefix=cache_prefix,
        )
        return watch.losses

    assert trained(True) == pytest.approx(trained(False), rel=CLOSE)


def test_a_head_alone_needs_no_block_at_all(run: Any) -> None:
    settings = {"method": "head", "targets": "all-linear", "layers": None, "rank": None}
    assert run(**settings, cache_prefix=True)[1].losses == pytest.approx(run(**settings)[1].losses, rel=CLOSE)


def test_each_row_goes_once_through_the_frozen_blocks(tmp_path: Path) -> None:
    model = model_of(CLEAN["llama"])
    cached, runs = cached_of(model), count_runs(model.model.layers[0])  # type: ignore[union-attr, index, arg-type]
    runs.clear()
    with cached.kept_in(tmp_path):
        for first in [0, 3, 6, 1, 4, 0]:
            batch = cached.padded(ROWS[first : first + 3])
            with cached.skipped(ROWS[first : first + 3], batch):
                cached.task.loss(model, batch)
    assert sum(runs) == len({tuple(each.input_ids) for each in ROWS})


def test_outside_a_step_every_block_computes(tmp_path: Path) -> None:
    model = model_of(CLEAN["llama"])
    cached, batch = cached_of(model), Collator(0)(ROWS[:2])
    before = cached.task.outputs(model, batch)
    with cached.kept_in(tmp_path), cached.skipped(ROWS[:2], batch):
        pass
    runs = count_runs(model.model.layers[0])  # type: ignore[union-attr, index, arg-type]
    assert torch.equal(cached.task.outputs(model, batch), before)
    assert runs == [2]


def test_a_run_whose_model_does_not_hold_goes_on_without(run: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, watch = Remembering(CLEAN["llama"]), Losses()
    found, _ = run(model=model, cache_prefix=True, output=tmp_path / "run", observer=watch)
    assert any("computed in every pass" in note for note in watch.notes)
    assert [choice.value for choice in found.summary.choices if choice.name == "cache_prefix"] == ["off"]
    assert read_config(tmp_path / "run" / "config.yaml")["cache_prefix"] is False


def test_no_file_is_seen_during_a_run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[str] = []
    run(cache_prefix=True, observer=Losses(3, lambda: seen.extend(os.listdir(tmp_path))))
    assert seen == []
    assert os.listdir(tmp_path) == []


def open_and_deleted() -> int:
    """Return how many files without a name this process holds for states."""
    gc.collect()
    return sum(".prefix-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def fails() -> None:
    raise TrainingError("the power went out")


def interrupts() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupts_twice() -> None:
    interrupts()
    interrupts()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not list what is mapped")
@pytest.mark.parametrize(
    ("end", "error"), [(fails, TrainingError), (interrupts, None), (interrupts_twice, KeyboardInterrupt)]
)
def test_the_space_is_free_again_however_a_run_ends(end: Any, error: Any, run: Any, tmp_path: Path) -> None:
    held: list[int] = []

    def ends() -> None:
        held.append(open_and_deleted())
        end()

    settings = {"cache_prefix": True, "output": tmp_path / "run", "save_every": 1, "observer": Losses(3, ends)}
    if error is None:
        run(**settings)
    else:
        with pytest.raises(error):
            run(**settings)
    assert held == [1]
    assert open_and_deleted() == 0
    assert not [name for _, folders, names in os.walk(tmp_path) for name in (*folders, *names) if "prefix" in name]


def test_a_resumed_run_gives_the_same_bits(rows_of: Rows, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    model_of(CLEAN["llama"]).save_pretrained(base)  # type: ignore[operator]
    tokenizer("llama").save_pretrained(base)
    data.write_text("".join(json.dumps(each) + "\n" for each in rows_of("prompted")), encoding="utf-8")
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "layers": "last:2", "save_every": 1, "cache_prefix": True}
    whole, broken, rest = Losses(), Losses(7, fails), Losses()
    fit(str(base), str(data), output=tmp_path / "whole", observer=whole, **settings)
    with pytest.raises(TrainingError):
        fit(str(base), str(data), output=tmp_path / "run", observer=broken, **settings)
    resume(tmp_path / "run", observer=rest)
    assert broken.losses[:6] + rest.losses == whole.losses
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    started = read_start(tmp_path / "run")
    assert started is not None
    assert [choice.value for choice in started.choices if choice.name == "cache_prefix"] == ["on"]


def test_the_plan_says_what_the_disk_holds(rows_of: Rows, bases: Callable[[str], Path]) -> None:
    settings = {"layers": "last:1", "epochs": 2}
    whole, kept = (
        plan_costs(bases("llama"), rows_of("prompted"), TrainConfig(**settings, cache_prefix=each), probing=False)
        for each in (False, True)
    )
    (note,) = set(kept.notes) - set(whole.notes)
    assert f"MiB of disk ({whole.tokens:,} tokens x 32 numbers of 4 bytes)" in note


def test_a_run_of_an_older_version_goes_on(rows_of: Rows, run: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    place, examples = tmp_path / "run", rows_of("prompted")
    with pytest.raises(TrainingError):
        run(examples=examples, output=place, save_every=1, observer=Losses(3, fails))
    settings = read_config(place / "config.yaml")
    del settings["cache_prefix"]
    (place / "config.yaml").write_text(write_config(settings), encoding="utf-8")
    for state in place.glob("checkpoints/*/state.json"):
        content = json.loads(state.read_text())
        content["facts"]["settings"].pop("cache_prefix", None)
        state.write_text(json.dumps(content))
    found = resume(place, model=model_of(CLEAN["llama"]), rows=examples, tokenizer=tokenizer("llama"))
    assert found.summary.finished


# Refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": None}, "block 0 of the 4 in 'model.layers' is trained already. Adapt upper blocks alone"),
        ({"train_modules": "embed_tokens"}, "is trained all the same .'model.embed_tokens.weight'."),
        ({"epochs": 1}, "no use in a run of 1 epochs"),
        ({"epochs": 1, "compile": True}, "(?s)2 problems:.*compile cannot be combined.*no use"),
    ],
)
def test_what_would_have_no_effect_is_refused_before_anything_is_written(
    settings: dict[str, Any], reason: str, run: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(**settings, cache_prefix=True, output=tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_an_encoder_decoder_is_refused(quick_fit: Any) -> None:
    with pytest.raises(ConfigError, match="not for an encoder-decoder"):
        quick_fit("t5", "prompted", cache_prefix=True)


def test_too_small_a_disk_is_refused_with_both_sizes(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    little = type(usage)(usage.total, usage.total, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: little)
    with pytest.raises(ConfigError, match=r"needs 0\.\d MiB of disk .* 1\.0 MiB are free at"):
        run(cache_prefix=True)


def test_the_model_is_as_before_after_a_refusal(run: Any) -> None:
    model = model_of(CLEAN["llama"])
    with pytest.raises(ConfigError):
        run(model=model, cache_prefix=True, layers=None)
    assert lk.handle_of(model) is None
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


# Places --------------------------------------------------------------------------------------------------


def test_rows_with_the_same_tokens_share_a_place() -> None:
    again = EncodedRow(ROWS[1].input_ids, [IGNORED] * len(ROWS[1].input_ids), 99, "other", "")
    found = Places([*ROWS, again], 2)
    assert found.slots([again]) == found.slots([ROWS[1]])
    assert found.num_tokens == Places(ROWS, 2).num_tokens


def test_every_slot_is_in_one_group_of_bounded_size() -> None:
    found = Places(ROWS, 2)
    lengths = [len(ROWS[number].input_ids) for number in found.rows]
    assert sorted(itertools.chain(*found.groups)) == list(range(len(found.rows)))
    assert all(max(lengths[slot] for slot in group) * len(group) <= 2 * 16 for group in found.groups)


def test_packed_rows_are_found_at_their_places() -> None:
    packed = PackingCollator(Collator(0, pad_to=4))
    batch, places = packed(ROWS), packed.places(ROWS)
    assert len(batch["input_ids"]) < len(ROWS)
    for each, (sequence, start) in zip(ROWS, places, strict=True):
        assert batch["input_ids"][sequence, start : start + len(each.input_ids)].tolist() == each.input_ids


def test_numbers_on_disk_are_kept_until_the_end(tmp_path: Path) -> None:
    with on_disk(tmp_path, 5, 3, torch.bfloat16) as found:
        found[2] = 1.5
        assert found.sum() == 4.5
        assert os.listdir(tmp_path) == []
    assert found.numel() == 0


def test_a_disk_that_is_full_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(TrainingError, match="MiB for cache_prefix cannot be had"),
        on_disk(tmp_path, 5, 3, torch.float32),
    ):
        pass
    assert os.listdir(tmp_path) == []
