"""Packed examples do not see one another, a packed step is the same step, and models that leak are not packed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    RwkvConfig,
)

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.training.checkpoint import Checkpoints
from lorakit.training.config import TrainConfig, read_config
from lorakit.training.costs.simulate import Setup, simulate
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import IGNORED, EncodedRow
from lorakit.training.fit import fit, resume
from lorakit.training.mode import training_mode
from lorakit.training.observe import Observer, Step
from lorakit.training.packing import (
    PackingCollator,
    Positions,
    Trial,
    decided,
    first_fit_decreasing,
    positions_of,
    tried,
)
from lorakit.training.plan import Plan
from lorakit.training.processes import Processes
from lorakit.training.spec import TaskSpec
from lorakit.training.stepper import Stepper

from .tiny import SIZES

ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CLEAN: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral, a window shorter than an example": MistralConfig(**SIZES, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=4),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "llama4, attention in chunks": Llama4TextConfig(
        **SIZES, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **ENDS),
}
LEAKING: dict[str, Any] = {
    "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "falcon with alibi": FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **ENDS
    ),
    "opt, whose positions come from the mask": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    ),
    "mamba": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
    "rwkv": RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64),
    "lfm2, a convolution": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}
# The same fp32 sums in another order, through ten steps.
CLOSE = 1e-5
PAD = Collator(0, pad_to=4, max_length=64)


def row(length: int, number: int = 1, given: int = 2) -> EncodedRow:
    draw = random.Random(f"{length}/{number}")
    ids = [draw.randrange(3, 64) for _ in range(length)]
    return EncodedRow(ids, [IGNORED] * given + ids[given:], number, "", "")


def rows_of_lengths(*lengths: int) -> list[EncodedRow]:
    return [row(length, number) for number, length in enumerate(lengths)]


SPREAD = rows_of_lengths(40, 7, 12, 9, 5, 8, 21, 6)


def model_of(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)  # a trained model's scores tell tokens apart
    return model


def trial_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Trial:
    """Try a model with an adapter that acts."""
    model = model.to(dtype)
    handle = lk.attach(model, lk.LoRA(rank=2), seed=0)
    for parameter in handle.parameters().values():
        nn.init.normal_(parameter, std=0.2)
    task = TaskSpec("generation", max_length=64).kind
    return tried(model, task, task.collator(0), SPREAD, list(handle.parameters().values()))


# Sequences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_sequence_and_none_is_too_full(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 32) for _ in range(40)]
    found = first_fit_decreasing(lengths, 32)
    assert sorted(i for each in found for i in each) == list(range(40))
    assert all(sum(lengths[i] for i in each) <= 32 for each in found)
    assert len(found) <= 11 / 9 * -(-sum(lengths) // 32) + 2  # no less can be filled than all tokens take


def test_positions_begin_anew_and_no_label_crosses() -> None:
    first, second = EncodedRow([5, 6, 7], [5, 6, 7], 1, "", ""), EncodedRow([8, 9], [-100, 9], 2, "", "")
    batch = PackingCollator(PAD).joined([[first, second]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert set(batch) == {"input_ids", "position_ids", "labels"}


def test_sequences_are_as_wide_as_the_longest_row() -> None:
    batch = PackingCollator(PAD)(SPREAD)
    assert batch["input_ids"].shape == (3, 40)


def test_rows_that_are_alike_are_padded() -> None:
    alike = rows_of_lengths(13, 14, 15, 16)
    found, expected = PackingCollator(PAD)(alike), PAD(alike)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_attention_by_length_gets_one_sequence() -> None:
    batch = PackingCollator(PAD, whole=True)(SPREAD)
    assert batch["input_ids"].shape == (1, 108)  # as many as there are, whatever the longest row may have


def test_all_supervised_tokens_are_left() -> None:
    task = TaskSpec("generation", max_length=64).kind
    labels = PackingCollator(PAD)(SPREAD)["labels"]
    assert int((labels != IGNORED).sum()) == sum(task.units(each) for each in SPREAD)


# Leaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CLEAN)
def test_models_whose_attention_ends_with_an_example_hold(kind: str, dtype: torch.dtype) -> None:
    found = trial_of(model_of(CLEAN[kind]), dtype)
    assert found.holds, found
    assert found.neighbour == 0  # not a bit of it


@pytest.mark.parametrize("kind", LEAKING)
def test_models_that_leak_are_found(kind: str) -> None:
    found = trial_of(model_of(LEAKING[kind]))
    assert not found.holds
    assert max(found.scores, found.neighbour) > 0.05  # far from rounding
    assert "they see one another" in str(found)


class Faint(LlamaForCausalLM):  # type: ignore[misc]
    """Adds a thousandth of the mean over the whole sequence to each token."""

    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        vectors = self.get_input_embeddings()(input_ids)
        mean = vectors.cumsum(1) / torch.arange(1, vectors.shape[1] + 1)[:, None]
        return super().forward(inputs_embeds=vectors + 1e-3 * mean, position_ids=position_ids, **kwargs)


def test_a_faint_leak_is_found() -> None:
    torch.manual_seed(0)
    assert not trial_of(Faint(LlamaConfig(**SIZES)).eval()).holds


def test_the_trial_leaves_no_trace() -> None:
    model = model_of(CLEAN["llama"])
    handle = lk.attach(model, lk.LoRA(rank=2, dropout=0.5), seed=0)
    model.train()
    generator, parameters = torch.get_rng_state(), list(handle.parameters().values())
    task = TaskSpec("generation", max_length=64).kind
    tried(model, task, task.collator(0), SPREAD, parameters)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in parameters)


# The same step ---------------------------------------------------------------------------------------


def losses_of(rows: Sequence[EncodedRow], packing: bool, micro_batch: int = 8, **fields: Any) -> list[float]:
    """Take ten steps on drawn rows, and return their losses."""
    model = model_of(CLEAN["llama"])
    handle = lk.attach(model, lk.LoRA(rank=4, alpha=16), seed=0)
    plan = Plan(num_steps=10, batch_size=8, micro_batch=micro_batch, lr=1e-2, packing=packing, **fields)
    stepper = Stepper(handle, "default", TaskSpec("generation", max_length=64).kind, PAD, plan)
    draw = random.Random(0)
    with training_mode(model, plan.grad_checkpointing):
        return [stepper.step(draw.sample(list(rows), 8)).loss for _ in range(10)]


@pytest.mark.parametrize("fields", [{}, {"grad_checkpointing": True}], ids=["", "checkpointing"])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_packed_losses_are_the_unpacked_ones(micro_batch: int, fields: dict[str, Any]) -> None:
    rows = [*SPREAD, *rows_of_lengths(33, 11, 6, 15, 4, 9)]
    packed, unpacked = (losses_of(rows, packing, micro_batch, **fields) for packing in (True, False))
    assert packed == pytest.approx(unpacked, rel=CLOSE)
    assert packed[-1] < packed[0]


def test_shares_of_several_processes_add_up_to_the_step() -> None:
    def gradient(count: int, rank: int, packing: bool) -> torch.Tensor:
        handle = lk.attach(model_of(CLEAN["llama"]), lk.LoRA(rank=4), seed=0)
        plan = Plan(num_steps=1, batch_size=8, micro_batch=4, lr=1e-2, packing=packing)
        stepper = Stepper(handle, "default", TaskSpec("generation", max_length=64).kind, PAD, plan)
        stepper.processes = Processes(count, rank)
        stepper._backward(SPREAD)
        return torch.cat([p.grad.flatten() for p in stepper.parameters if p.grad is not None])

    together = gradient(2, 0, True) + gradient(2, 1, True)
    expected = gradient(1, 0, False)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=CLOSE * float(expected.abs().max()))


class Collect(Observer):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, step: Step) -> None:
        self.losses.append(step.loss)


def uneven(layout: str, rows_of: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a layout's rows, one of eight of them long."""
    rows = rows_of(layout, 48)
    for i, each in enumerate(rows):
        if i % 8 == 0 and layout == "prompted":
            each["prompt"] = " ".join([each["prompt"]] * 4)
        if i % 8 == 0 and layout == "talked":
            each["messages"] = each["messages"][:2] * 3
    return rows


@pytest.mark.parametrize(("kind", "layout"), [("llama", "prompted"), ("llama-chat", "talked")])
def test_a_run_packed_learns_as_one_that_is_not(quick_fit: Any, rows_of: Any, kind: str, layout: str) -> None:
    rows, found = uneven(layout, rows_of), {}
    for packing in ("on", "off"):
        watch = Collect()
        result = quick_fit(kind, rows, packing=packing, observer=watch, max_steps=6)
        found[packing] = watch.losses
        assert next(c.value for c in result.summary.choices if c.name == "packing") == packing
    assert found["on"] == pytest.approx(found["off"], rel=CLOSE)


def test_a_resumed_run_is_the_whole_run(quick_fit: Any, rows_of: Any, bases: Any, tmp_path: Path) -> None:
    rows = uneven("prompted", rows_of)
    whole, rest = Collect(), Collect()
    settings = {"packing": "on", "max_steps": 6, "save_every": 2, "keep": 9}
    quick_fit("llama", rows, observer=whole, output=str(tmp_path / "run"), **settings)
    cut(tmp_path / "run", 4)
    resume(tmp_path / "run", rows=rows, observer=rest)
    assert rest.losses == whole.losses[4:]


def cut(run: Path, step: int) -> None:
    """Make a finished run one that was killed after ``step`` steps."""
    for folder in Checkpoints(run).folder.iterdir():
        if int(folder.name.split("-")[1]) > step:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    (run / "run.json").unlink()


# What a run decides ----------------------------------------------------------------------------------


def bloom() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2, **ENDS))


def test_a_run_of_a_model_that_leaks_says_so_and_goes_on(tokenizer: Any, rows_of: Any) -> None:
    rows = uneven("prompted", rows_of)
    result = fit(bloom(), rows, tokenizer=tokenizer("llama"), max_steps=2, validation=0.2, packing="on")
    said = [note for note in result.summary.notes if note.startswith("Examples are not packed: in BloomForCausalLM")]
    assert len(said) == 1
    assert "gradient change by up to" in said[0]
    choice = next(c for c in result.summary.choices if c.name == "packing")
    assert (choice.value, "see one another" in choice.reason) == ("off", True)


@pytest.mark.parametrize(
    ("kind", "layout", "reason"),
    [("t5", "prompted", "an encoder-decoder reads"), ("bert", "classified", "one answer for all of it")],
)
def test_rows_that_cannot_share_a_sequence_are_padded(quick_fit: Any, kind: str, layout: str, reason: str) -> None:
    result = quick_fit(kind, layout, packing="on", max_steps=1)
    choice = next(c for c in result.summary.choices if c.name == "packing")
    assert choice.value == "off"
    assert reason in choice.reason


TASK = TaskSpec("generation", max_length=64).kind
FLASH = LlamaConfig(**SIZES, attn_implementation="sdpa")
FLASH._attn_implementation_internal = "flash_attention_2"


@pytest.mark.parametrize(
    ("config", "device", "spared", "packs"),
    [
        (CLEAN["llama"], "cpu", 0.2, True),
        (CLEAN["llama"], "cpu", 0.01, False),
        (CLEAN["llama"], "cuda", 0.2, False),
        (FLASH, "cuda:1", 0.01, True),
    ],
    ids=["spread", "alike", "a GPU with a mask", "a GPU by length"],
)
def test_unasked_it_packs_where_that_was_measured_to_pay(config: Any, device: str, spared: float, packs: bool) -> None:
    found = Positions(800, 1000, round(1000 * (1 - spared)))
    assert decided("auto", TASK, config, device, found)[0] is packs


def test_positions_are_those_of_the_batches_that_a_run_makes() -> None:
    lengths = [len(each.input_ids) for each in SPREAD]
    found = positions_of(lengths, 8, 8, 0, PackingCollator(PAD))
    assert found == Positions(108, 8 * 40, 3 * 40)
    alone = positions_of(lengths, 8, 1, 0, PackingCollator(PAD))
    assert alone.spared == 0


def test_a_plan_simulates_the_packed_step() -> None:
    plan = Plan(num_steps=1, batch_size=8, micro_batch=8, lr=1e-3)
    spec = TaskSpec("generation", max_length=64)
    setup = Setup(CLEAN["llama"], torch.float32, spec, lk.LoRA(rank=4), {"seed": 0}, plan)
    padded, packed = (simulate(replace(setup, plan=replace(plan, packing=p)), SPREAD) for p in (False, True))
    positions = PackingCollator(spec.kind.collator(0))(SPREAD)["input_ids"].numel() / (8 * 40)
    assert packed.flops / padded.flops == pytest.approx(positions, rel=0.1)  # the head's are the same
    assert packed.memory.activations < padded.memory.activations


@pytest.mark.parametrize("word", ["on", "off"])
def test_a_bare_word_of_yaml_is_the_setting(word: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"packing: {word}\n")
    assert TrainConfig(**read_config(tmp_path / "run.yaml")).packing == word


def test_the_setting_is_one_of_three_words() -> None:
    with pytest.raises(ConfigError, match="packing"):
        TrainConfig(packing="always")
