"""Models with several kinds of layer: the real ``peft`` reads our folders, and we read its."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lorakit.formats import load_adapter, save_adapter
from lorakit.methods import Method
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA

from .models import FP32_TOLERANCE, VOCABULARY, build, output, shake, shaken
from .test_peft_format import assert_same

peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")

LORA = LoRA(rank=3, alpha=5)


class Voice(nn.Module):
    """Convolutions in one and three dimensions with the options that PEFT has, and a scaled embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Gemma3TextScaledWordEmbedding(VOCABULARY, 6, 0, embed_scale=2.5)
        self.wave = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.same = nn.Conv2d(1, 4, (3, 1), padding="same", bias=False)
        self.volume = nn.Conv3d(4, 5, (1, 2, 3), stride=(1, 2, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wave(self.embed(tokens).transpose(1, 2))
        return self.volume(self.same(x[:, None])[:, :, None]).flatten(1)


class Encoder(nn.Module):
    """Attention between two linear layers, as torch's own encoder has it."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.end = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.end(self.attention(x, x, x)[0])


class Crossed(nn.Module):
    """Attention with three projections of their own, whose biases are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.start(x), x, x)[0]


class Swapped(nn.Module):
    """A matrix stored as [d_in, d_out], of which PEFT takes note in stacks only."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Mixer(nn.Module):
    """A module with matrices of its own, not in the order of their names, around a linear layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Parameter(0.3 * torch.randn(6, 8))
        self.stack = nn.Parameter(0.3 * torch.randn(3, 8, 8))
        self.inner = nn.Parameter(0.3 * torch.randn(8, 6))
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.linear(x)) @ self.inner.T
        return torch.einsum("bld,edo->blo", h, self.stack) @ self.outer.T


class Mixed(nn.Module):
    """A mixer, a recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.mixer(x))[0]
        return self.head(self.attention(x, x, x)[0])


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, rope_parameters=rope))


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "voice": (Voice, lambda: {"tokens": torch.randint(0, VOCABULARY, (2, 9))}),
    "encoder": (Encoder, lambda: {"x": torch.randn(2, 4, 6)}),
    "crossed": (Crossed, lambda: {"x": torch.randn(2, 4, 6)}),
    "swapped": (lambda: nn.Sequential(nn.Tanh(), Swapped()), lambda: {"input": torch.randn(2, 6)}),
    "mixed": (Mixed, lambda: {"x": torch.randn(2, 4, 6)}),
    "mixtral": (mixtral, lambda: {"input_ids": torch.randint(0, VOCABULARY, (2, 7))}),
    "gpt-oss": (gpt_oss, lambda: {"input_ids": torch.randint(0, VOCABULARY, (2, 7))}),
}


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in evaluation mode, with the same weights each time, and an input for it."""
    if name not in MODELS:
        return build(name)
    torch.manual_seed(7)
    model, inputs = MODELS[name][0](), MODELS[name][1]()
    return model.eval().requires_grad_(False), inputs


@dataclass(frozen=True)
class Case:
    """One adapter, in our words; in PEFT's too, where it can make it."""

    model: str
    targets: Sequence[str]
    method: Method = LORA
    theirs: dict[str, Any] | None = None

    def peft_config(self) -> Any:
        return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], **(self.theirs or {})})


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONVOLUTIONS = ["wave", "same", "volume"]
MIXER = ["mixer.outer", "mixer.stack", "mixer.inner"]
QKV = {"target_modules": ["c_attn"], "fan_in_fan_out": True}

CASES = {
    "convolutions": Case("voice", CONVOLUTIONS, theirs={"target_modules": CONVOLUTIONS}),
    "dora convolutions": Case(
        "voice", CONVOLUTIONS, DoRA(rank=3, alpha=5), {"target_modules": CONVOLUTIONS, "use_dora": True}
    ),
    "biases of convolutions": Case("voice", CONVOLUTIONS, LORA.replaced(bias="lora_only")),
    "scaled embedding": Case("voice", ["embed"], theirs={"target_modules": ["embed"]}),
    "input projection": Case("encoder", ["attention.in_proj_weight", "end"]),
    "parts of attention": Case("encoder", ["attention[q,v]"], LORA.replaced(scaling="rslora")),
    "biases of attention": Case("encoder", ["attention.in_proj_weight", "end"], LORA.replaced(bias="all")),
    "all rows in parts": Case("gpt2", ["c_attn[q,k,v]"], DoRA(rank=3, alpha=5, bias="lora_only")),
    "parts": Case("gpt2", ["c_attn[q,v]", "mlp.c_proj"], LORA.replaced(scaling="rslora")),
    "part of one layer": Case("gpt2", ["transformer.h.1.attn.c_attn[k]", "transformer.h.0.attn.c_attn"]),
    "experts": Case(
        "mixtral", ["q_proj", *EXPERTS], theirs={"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    ),
    "experts of two ranks": Case(
        "mixtral",
        EXPERTS,
        LORA.replaced(rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.*gate_up_proj": 4}),
        {
            "target_parameters": EXPERTS,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"layers.1.*gate_up_proj": 4},
        },
    ),
    "experts stored transposed": Case("gpt-oss", EXPERTS, theirs={"target_parameters": EXPERTS, "use_rslora": True}),
    "second parameter only": Case("gpt-oss", ["down_proj"], theirs={"target_parameters": ["down_proj"]}),
    "gates of experts": Case("mixtral", ["gate_up_proj[gate]", "gate_up_proj[up]", "mlp.experts.down_proj"]),
    "biases of experts": Case("gpt-oss", ["down_proj"], LORA.replaced(bias="lora_only")),
    "router": Case("mixtral", ["mlp.gate.weight"], theirs={"target_parameters": ["mlp.gate.weight"]}),
    "parameters around a layer": Case("mixed", [*MIXER[::-1], "linear"]),
    "one parameter around a layer": Case(
        "mixed",
        ["mixer.stack", "linear"],
        theirs={"target_parameters": ["mixer.stack"], "target_modules": ["linear"]},
    ),
    "biases of everything": Case("mixed", ["head", "mixer.inner"], LORA.replaced(bias="all")),
}
PEFTS = {
    **{name: case for name, case in CASES.items() if case.theirs is not None},
    "attention": Case("encoder", [], theirs={"target_modules": ["attention", "end"]}),
    "attention by pattern": Case(
        "encoder",
        [],
        theirs={
            "target_modules": "(attention|start)",
            "rank_pattern": {"attention": 2},
            "alpha_pattern": {"attention": 3},
        },
    ),
}
REFUSED = {
    "output projection": Case("encoder", ["attention.out_proj", "start"]),
    "both projections": Case("encoder", ["attention", "end"], LORA.replaced(bias="lora_only")),
    "dora of attention": Case("encoder", ["attention.in_proj_weight"], DoRA(rank=3, alpha=5)),
    "dora of experts": Case("gpt-oss", ["q_proj", *EXPERTS], DoRA(rank=3, alpha=5)),
    "a matrix stored transposed": Case("swapped", ["1.weight"]),
    "dora of parts": Case("gpt2", ["c_attn[q,v]", "mlp.c_proj"], DoRA(rank=3, alpha=5)),
    "biases of parts": Case("gpt2", ["c_attn[q,v]"], LORA.replaced(bias="lora_only")),
    "biases of separate projections": Case("crossed", ["start"], LORA.replaced(bias="all")),
    "parts of two scales": Case("gpt2", ["c_attn[q,v]"], LORA.replaced(rank_pattern={r"1\.attn\.c_attn\[q\]": 2})),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_our_file_gives_our_outputs_in_peft(case: Case, tmp_path: Path) -> None:
    model, inputs = made(case.model)
    handle = shaken(model, case.method, case.targets)
    expected = output(model, inputs)
    save_adapter(handle, tmp_path)

    base, _ = made(case.model)
    before = output(base, inputs)
    found = output(peft.PeftModel.from_pretrained(base, tmp_path), inputs)

    torch.testing.assert_close(found, expected, atol=FP32_TOLERANCE, rtol=0)
    assert (expected - before).abs().max() > 100 * FP32_TOLERANCE


@pytest.mark.parametrize("case", [*CASES.values(), *REFUSED.values()], ids=[*CASES, *REFUSED])
def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_base(case: Case, tmp_path: Path) -> None:
    model, inputs = made(case.model)
    handle = shaken(model, case.method, case.targets)
    handle.trainable("default", False)  # torch takes other kernels for what is trained
    expected, state = output(model, inputs), handle.state()
    save_adapter(handle, tmp_path)

    base, _ = made(case.model)
    assert_same(load_adapter(base, tmp_path).state(), state)
    assert torch.equal(output(base, inputs), expected)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_peft_refuses_what_it_cannot_compute(case: Case, tmp_path: Path) -> None:
    model, _ = made(case.model)
    save_adapter(shaken(model, case.method, case.targets), tmp_path)
    with pytest.raises(KeyError, match="LORAKIT"):
        peft.PeftModel.from_pretrained(made(case.model)[0], tmp_path)


@pytest.mark.parametrize("case", PEFTS.values(), ids=PEFTS.keys())
def test_pefts_file_gives_pefts_outputs_here(case: Case, tmp_path: Path) -> None:
    model, inputs = made(case.model)
    adapted = peft.get_peft_model(model, case.peft_config()).eval()
    shake(p for p in adapted.parameters() if p.requires_grad)
    expected = output(adapted, inputs)
    adapted.save_pretrained(tmp_path)

    base, _ = made(case.model)
    before = output(base, inputs)
    load_adapter(base, tmp_path)

    torch.testing.assert_close(output(base, inputs), expected, atol=FP32_TOLERANCE, rtol=0)
    assert (expected - before).abs().max() > 100 * FP32_TOLERANCE
