"""Every class of transformers whose fused projection lorakit knows, built tiny from its own config."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorakit.layers.fused import LAYOUTS
from lorakit.layers.ops import find_ops

MODELS = Path(transformers.__file__).parent / "models"
TOKENS, HEADS, GROUPS, HEAD_DIM = 5, 4, 2, 6  # no two alike, so that no layout is another one by chance
WIDTH = HEADS * HEAD_DIM

# Of these, a config gets the fields that it has.
SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "n_embd", "d_model", "hidden_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), GROUPS),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels", "rotary_dim", "qk_rope_head_dim"), HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 10),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_pos_emb"), 16),
    **{"q_lora_rank": 7, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "v_head_dim": 3, "qk_head_dim": 4 + HEAD_DIM},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 3, "linear_value_head_dim": 5},
    "linear_conv_kernel_dim": 1,  # wider ones mix neighbours before the attention does
    **{"context_size": TOKENS, "block_size": 4, "hidden_act": "silu", "_attn_implementation": "eager"},
    **{"weight_mode": "fused", "fast_qkv": True, "relative_attention": False},
    **dict.fromkeys(("use_rel_pos", "use_relative_position_embeddings"), False),
    **dict.fromkeys(("has_relative_attention_bias", "has_spatial_attention_bias"), False),
}
# Arguments of constructors other than a config, by name.
ARGUMENTS: dict[str, object] = {
    **{"layer_idx": 0, "window_size": 0, "stage_idx": 0, "n_positions": 16, "hidden_act": "silu"},
    **{"nx": WIDTH, "dim": WIDTH, "dim_out": WIDTH, "embed_dim": WIDTH, "intermediate_size": 10},
    **{"hidden_size": WIDTH, "hidden_size_output": WIDTH, "dim_head": HEAD_DIM, "head_width": HEAD_DIM},
    **{"num_heads": HEADS, "heads": HEADS, "num_attention_heads": HEADS},
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def causal() -> Tensor:
    mask = torch.full((1, 1, TOKENS, TOKENS), torch.finfo(torch.float64).min, dtype=torch.float64)
    return mask.triu(1)


def angles(size: int) -> Tensor:
    """Return angles that grow with the position, ``[tokens, size]``."""
    return torch.arange(TOKENS, dtype=torch.float64)[:, None] * torch.linspace(1, 0.1, size, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One class, or one form of it.

    Attributes:
        key: its name in the table.
        config: name of its config's class, where the constructor does not say.
        fields: given to the config; ``sizes`` are set beside ``SIZES`` afterwards, ``nested`` in configs inside it.
        arguments: of the constructor, beside ``ARGUMENTS``.
        inputs: further inputs of ``forward``, or others than usual.
        kind: how it mixes tokens, one of ``ROLES`` of the test.
        watch: the child before which the mixing is over; where empty, the module's own output is looked at.
        dtype: fp64, where the class computes in it.
    """

    key: str
    config: str = ""
    fields: Mapping[str, object] = field(default_factory=dict)
    sizes: Mapping[str, object] = field(default_factory=dict)
    nested: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)
    inputs: Callable[[], dict[str, object]] = dict
    kind: str = "softmax"
    watch: str = ""
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        form = [f"{k}={v}" for k, v in {**self.fields, **self.arguments}.items() if isinstance(v, bool)]
        return " ".join([self.key, *form])

    @property
    def child(self) -> str:
        return self.key.rsplit(".", 1)[1]

    def module(self) -> nn.Module:
        """Build it with random weights, in evaluation mode."""
        file, name, _ = self.key.split(".")
        found = next(MODELS.glob(f"*/modeling_{file}.py"), None)
        if found is None:
            pytest.skip(f"transformers {transformers.__version__} has no modeling_{file}")
        home = importlib.import_module(f"transformers.models.{found.parent.name}.modeling_{file}")
        kind = getattr(home, name)
        wanted = inspect.signature(kind.__init__).parameters
        given = {key: value for key, value in {**ARGUMENTS, **self.arguments}.items() if key in wanted}
        if "config" in wanted:
            given["config"] = self._config(home, wanted["config"].annotation)
        module: nn.Module = kind(**given).to(self.dtype).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)  # a softmax that is far from saturated
        return module

    def _config(self, home: Any, annotation: Any) -> Any:
        """Make the config that this case or the annotation names, else the first one of the file."""
        if annotation is inspect.Parameter.empty:
            names = [n for n, v in vars(home).items() if n.endswith("Config") and inspect.isclass(v)]
            names = [n for n in names if n not in ("PretrainedConfig", "PreTrainedConfig", "GenerationConfig")]
            annotation = next((n for n in names if "Vision" in n and "Text" not in self.key), names[0])
        annotation = self.config or annotation
        config = (vars(home)[annotation] if isinstance(annotation, str) else annotation)(**self.fields)
        if "hidden_size" not in dir(config) and "text_config" in dir(config):
            config = config.text_config
        for name, value in {**SIZES, **self.sizes}.items():
            own = name in dir(config) and not isinstance(getattr(type(config), name, None), property)
            if own and name not in self.fields:
                setattr(config, name, value)
        for name, values in self.nested.items():
            for inner, value in values.items():
                setattr(getattr(config, name), inner, value)
        return config

    def inputs_of(self, module: nn.Module) -> dict[str, object]:
        """Return inputs for its forward: one row of ``TOKENS`` tokens that see one another as the class has it."""
        wanted = inspect.signature(type(module).forward).parameters
        packed = "cu_seqlens" in wanted
        turns = angles(HEAD_DIM // 2).repeat(1, 2)
        turns = turns if packed else turns[None]
        usual: dict[str, object] = {
            list(wanted)[1]: random(TOKENS, WIDTH) if packed else random(1, TOKENS, WIDTH),
            "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
            "position_embeddings": (turns.cos(), turns.sin()),
            "position_ids": torch.arange(TOKENS)[None],
        }
        mask = wanted.get("attention_mask")
        if mask is not None and mask.default is inspect.Parameter.empty:
            usual["attention_mask"] = causal() if self.kind == "softmax" else None
        given = {**{n: v for n, v in usual.items() if n in wanted}, **self.inputs()}
        is_wide = {n: isinstance(v, Tensor) and v.dtype == torch.float64 for n, v in given.items()}
        return {n: v.to(self.dtype) if is_wide[n] else v for n, v in given.items()}


def num_rows(module: nn.Module, child: str) -> int:
    layer = module.get_submodule(child)
    ops = find_ops(layer)
    assert ops is not None
    return ops.dims(layer)[0]


def constant(**values: object) -> Callable[[], dict[str, object]]:
    return lambda: values


def image() -> dict[str, object]:
    return {"hidden_states": random(1, 2, 3, WIDTH)}


def other_sequence() -> dict[str, object]:
    return {"encoder_hidden_states": random(1, TOKENS, WIDTH)}


def complex_turns() -> dict[str, object]:
    turns = angles(HEAD_DIM // 2)
    return {"position_embeddings": torch.polar(torch.ones_like(turns), turns)[None]}


PER_HEAD = {"num_key_value_heads": HEADS}
STAGE = {"embed_dim": [WIDTH], "num_heads": [HEADS], "num_groups": [GROUPS], "window_size": 3}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 6, "indexer_budget": 8}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
GATED = {"kind": "gated query", "watch": "o_proj"}
LINEAR = {"kind": "linear", "watch": "norm"}

# What a key that ends so needs, one entry for each form of the class; the first ending that fits counts.
FORMS: tuple[tuple[tuple[str, ...], tuple[dict[str, Any], ...]], ...] = (
    (("BarkSelfAttention.att_proj",), ({"config": "BarkSemanticConfig"},)),
    (
        (
            *("SamVisionAttention.qkv", "SamHQVisionAttention.qkv", "SLANeXtVisionAttention.qkv"),
            *("PPFormulaNetVisionAttention.qkv", "Sam2MultiScaleAttention.qkv", "GotOcr2VisionAttention.qkv"),
            "SegGptAttention.qkv",
        ),
        ({"inputs": image},),
    ),
    (("VitDetAttention.qkv",), ({"inputs": lambda: {"hidden_state": random(1, 2, 3, WIDTH)}},)),
    (("Florence2VisionWindowAttention.qkv",), ({"fields": STAGE, "inputs": image},)),
    (("Florence2VisionChannelAttention.qkv",), ({"fields": STAGE, "kind": "channels", "watch": "proj"},)),
    (
        ("LayoutLMv2SelfAttention.qkv_linear",),
        ({"inputs": constant(attention_mask=torch.zeros(1, 1, 1, TOKENS)), "dtype": torch.float32},),
    ),
    (("MptAttention.Wqkv",), ({"inputs": constant(position_bias=torch.zeros(HEADS, TOKENS, TOKENS))},)),
    (
        ("GPT2Attention.c_attn", "ImageGPTAttention.c_attn"),
        ({}, {"arguments": {"is_cross_attention": True}, "inputs": other_sequence}),
    ),
    (
        ("EvollaSequenceCompressorAttention.to_kv",),
        ({"inputs": lambda: {"latents": random(1, 3, WIDTH), "mask": torch.ones(1, TOKENS + 3)}},),
    ),
    (
        ("ConformerAttention.to_kv",),
        ({"inputs": constant(attention_dists=torch.zeros(TOKENS, TOKENS, dtype=torch.long))},),
    ),
    (
        ("BloomAttention.query_key_value",),
        ({"inputs": lambda: {"residual": random(1, TOKENS, WIDTH), "alibi": random(HEADS, 1, TOKENS)}},),
    ),
    (
        ("FalconAttention.query_key_value",),
        (
            {"fields": {"new_decoder_architecture": True}, "inputs": constant(alibi=None)},
            {"fields": {"multi_query": True}, "inputs": constant(alibi=None)},
            {"fields": {"multi_query": False, "num_kv_heads": HEADS}, "inputs": constant(alibi=None)},
        ),
    ),
    (("GPTBigCodeAttention.c_attn",), ({"fields": {"multi_query": True}}, {"fields": {"multi_query": False}})),
    (
        ("CodeGenAttention.qkv_proj",),
        (
            {
                "fields": {"n_embd": 2 * WIDTH, "n_head": 2 * HEADS},
                "inputs": lambda: {"hidden_states": random(1, TOKENS, 2 * WIDTH)},
            },
        ),
    ),
    (("PersimmonAttention.query_key_value",), ({"fields": ROTATED},)),
    (
        ("DbrxAttention.Wqkv",),
        (
            {
                "config": "DbrxConfig",
                "nested": {"attn_config": {"kv_n_heads": GROUPS, "clip_qkv": 1e9, "rope_theta": 1e4}},
            },
        ),
    ),
    (("DeepseekV2Attention.kv_b_proj",), ({"sizes": PER_HEAD, "inputs": complex_turns},)),
    (
        ("Dots3NoteTextAttention.kv_b_proj",),
        ({"sizes": PER_HEAD, "fields": {"num_hidden_layers": 1, "use_sliding_window": False}},),
    ),
    (
        ("MistralLarge4TextAttention.kv_b_proj",),
        ({"sizes": PER_HEAD, "inputs": lambda: {"shared_kv_states": {}}},),
    ),
    (
        ("Glm5NextTextAttention.kv_b_proj",),
        ({"sizes": PER_HEAD, "inputs": constant(attention_mask=torch.ones(1, TOKENS, dtype=torch.bool))},),
    ),
    ((".kv_b_proj",), ({"sizes": PER_HEAD},)),
    (
        ("Qwen4ExpTextAttention.q_proj",),
        (
            {
                **GATED,
                "sizes": {**INDEXER, "indexer_compress_ratio": 2},
                "inputs": lambda: {"attention_mask": causal()},
            },
        ),
    ),
    (("AXK2Attention.q_gate_proj",), ({**GATED, "sizes": PER_HEAD, "inputs": lambda: {"attention_mask": causal()}},)),
    ((".q_proj",), (GATED,)),
    (("MiniMaxLightningAttention.qkv_proj", "DeltaNet.in_proj_qkv", "DeltaNet.in_proj_qkvz"), (LINEAR,)),
    (("xLSTMLayer.qkv_opreact",), ({**LINEAR, "watch": "multihead_norm"},)),
    (("DiaMLP.gate_up_proj",), ({"config": "DiaDecoderConfig", "kind": "unit"},)),
    (
        ("Zamba2MLP.gate_up_proj",),
        (
            {
                "kind": "unit",
                "arguments": {"num_fwd_mem_blocks": 1, "block_id": 0},
                "inputs": constant(layer_idx=6),
            },
        ),
    ),
    ((".gate_up_proj", ".input_linear", ".Wi", ".fc1", "ClvpGatedLinearUnit.proj"), ({"kind": "unit"},)),
)


def forms_of(key: str) -> tuple[dict[str, Any], ...]:
    return next((forms for endings, forms in FORMS if key.endswith(endings)), ({},))


CASES = [Case(key, **form) for key in LAYOUTS for form in forms_of(key)]
