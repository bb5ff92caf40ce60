"""Which rows of a fused projection are q, k and v: data about the classes of transformers that have one.

A layout is a pattern of parts that is repeated over the rows:

    GPT-2     c_attn            (q: hidden, k: hidden, v: hidden)                        once
    Phi-3     qkv_proj          (q: heads * head_dim, k: kv * head_dim, v: the same)     once
    BLOOM     query_key_value   (q: head_dim, k: head_dim, v: head_dim)                  for every head
    Falcon    query_key_value   (q: heads / kv * head_dim, k: head_dim, v: head_dim)     for every group

``gate`` is what an activation acts on and ``up`` what is multiplied by it, as in Llama's ``gate_proj`` and
``up_proj``, whatever the class calls them. Of a linear attention, or beside a ``q``, ``gate`` is the output's.

The key is the class and the child's name; a subclass that changes any function of that class, ``forward``
or what it calls, is not covered. Sizes are read from the module and must add up to the weight's rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lorakit.errors import UnsupportedLayerError, quoted
from lorakit.layers.linear import LinearOps
from lorakit.layers.ops import Runs, host_class


@dataclass(frozen=True)
class Pattern:
    """Parts that follow one another, all of them ``times`` times.

    >>> Pattern(2, {"q": 3, "k": 1}).runs()
    {'q': ((0, 3), (4, 7)), 'k': ((3, 4), (7, 8))}

    Attributes:
        times: how often, at least once.
        sizes: rows of each part in one repetition, in order.
    """

    times: int
    sizes: Mapping[str, int]

    def num_rows(self) -> int:
        """Return how many rows all parts have together."""
        return self.times * sum(self.sizes.values())

    def runs(self) -> dict[str, Runs]:
        """Return the rows of each part."""
        found: dict[str, Runs] = {}
        start, distance = 0, sum(self.sizes.values())
        for name, size in self.sizes.items():
            firsts = range(start, start + self.times * distance, distance)
            found[name] = tuple((first, first + size) for first in firsts)
            start += size
        return found


Rule = Callable[[Any, int], Pattern]


def _equal(*names: str) -> Rule:
    """Return the rule of parts of one size, each in one piece."""
    return lambda module, rows: Pattern(1, dict.fromkeys(names, rows // len(names)))


def _by_head(heads: str, size: str, *names: str) -> Rule:
    """Return the rule of parts of one size for every head; the module has both numbers by these names."""
    return lambda module, rows: Pattern(_number(module, heads), dict.fromkeys(names, _number(module, size)))


def _number(module: Any, path: str) -> int:
    for name in path.split("."):
        module = getattr(module, name)
    return int(module)


def _own_or_crossed(module: Any, rows: int) -> Pattern:
    """Attention over another sequence takes its q from a projection of its own, ``q_attn``."""
    names = "kv" if module.is_cross_attention else "qkv"
    return Pattern(1, dict.fromkeys(names, rows // len(names)))


def _grouped_heads(module: Any, rows: int) -> Pattern:
    kv = module.num_key_value_heads * module.head_dim
    return Pattern(1, {"q": module.config.num_attention_heads * module.head_dim, "k": kv, "v": kv})


def _dbrx(module: Any, rows: int) -> Pattern:
    kv = module.num_key_value_heads * module.head_dim
    return Pattern(1, {"q": module.hidden_size, "k": kv, "v": kv})


def _exaone_vision(module: Any, rows: int) -> Pattern:
    return Pattern(1, {"q": module.q_dim, "k": module.kv_dim, "v": module.kv_dim})


def _gpt_bigcode(module: Any, rows: int) -> Pattern:
    if module.is_cross_attention:  # its forward takes one head's rows of each, whatever the number of heads
        return Pattern(1, dict.fromkeys("kv", module.head_dim))
    if module.multi_query:
        return Pattern(1, {"q": module.embed_dim, "k": module.kv_dim, "v": module.kv_dim})
    return Pattern(module.num_heads, dict.fromkeys("qkv", module.head_dim))


def _falcon(module: Any, rows: int) -> Pattern:
    groups = module.num_heads
    if module.new_decoder_architecture:
        groups = module.num_kv_heads
    elif module.multi_query:
        groups = 1
    size = module.head_dim
    return Pattern(groups, {"q": module.num_heads // groups * size, "k": size, "v": size})


def _codegen(module: Any, rows: int) -> Pattern:
    pieces = 4  # a constant of its forward: the machines that it was trained on
    return Pattern(pieces, dict.fromkeys("qvk", module.num_attention_heads * module.head_dim // pieces))


def _latent(module: Any, rows: int) -> Pattern:
    return Pattern(module.num_heads, {"k": module.qk_nope_head_dim, "v": module.v_head_dim})


def _gated_query_latent(module: Any, rows: int) -> Pattern:
    return Pattern(module.num_heads, {"q": module.qk_head_dim, "gate": module.v_head_dim})


def _delta(module: Any, rows: int) -> Pattern:
    return Pattern(1, {"q": module.key_dim, "k": module.key_dim, "v": module.value_dim})


def _gated_delta(module: Any, rows: int) -> Pattern:
    v = module.num_v_heads // module.num_k_heads * module.head_v_dim
    return Pattern(module.num_k_heads, {"q": module.head_k_dim, "k": module.head_k_dim, "v": v, "gate": v})


def _mlstm(module: Any, rows: int) -> Pattern:
    return Pattern(1, {"q": module.qk_dim, "k": module.qk_dim, "v": module.v_dim, "gate": module.v_dim})


# (rule, "file.Class.child ..."): the file is transformers/models/*/modeling_<file>.py
_TABLE: tuple[tuple[Rule, str], ...] = (
    (
        _equal("q", "k", "v"),
        """
        bark.BarkSelfAttention.att_proj blip.BlipAttention.qkv blip_2.Blip2Attention.qkv
        cohere_compass.CohereCompassVisionAttention.qkv deepseek_ocr2.DeepseekOcr2SamVisionAttention.qkv
        dots3_note.Dots3NoteVisionAttention.qkv ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention.qkv
        florence2.Florence2VisionChannelAttention.qkv florence2.Florence2VisionWindowAttention.qkv
        glm4v.Glm4vVisionAttention.qkv glm4v_moe.Glm4vMoeVisionAttention.qkv glm5_next.Glm5NextVisionAttention.qkv
        glm_image.GlmImageVisionAttention.qkv glm_ocr.GlmOcrVisionAttention.qkv got_ocr2.GotOcr2VisionAttention.qkv
        hiera.HieraMaskUnitAttention.qkv instructblip.InstructBlipAttention.qkv
        instructblipvideo.InstructBlipVideoAttention.qkv layoutlmv2.LayoutLMv2SelfAttention.qkv_linear
        mgp_str.MgpstrAttention.qkv modernbert.ModernBertAttention.Wqkv mpt.MptAttention.Wqkv
        openai.Attention.c_attn pp_formulanet.PPFormulaNetVisionAttention.qkv
        pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention.qkv pp_ocrv5_server_rec.PPOCRV5ServerRecAttention.qkv
        pp_ocrv6_small_rec.PPOCRV6SmallRecAttention.qkv qwen2_5_vl.Qwen2_5_VLVisionAttention.qkv
        qwen2_vl.VisionAttention.qkv qwen3_5.Qwen3_5VisionAttention.qkv qwen3_5_moe.Qwen3_5MoeVisionAttention.qkv
        qwen3_omni_moe.Qwen3OmniMoeVisionAttention.qkv qwen3_vl.Qwen3VLVisionAttention.qkv
        qwen3_vl_moe.Qwen3VLMoeVisionAttention.qkv qwen4_exp.Qwen4ExpVisionAttention.qkv
        sam.SamVisionAttention.qkv sam2.Sam2MultiScaleAttention.qkv sam_hq.SamHQVisionAttention.qkv
        seggpt.SegGptAttention.qkv slanext.SLANeXtVisionAttention.qkv timesformer.TimesformerSelfAttention.qkv
        unlimited_ocr.UnlimitedOcrSamVisionAttention.qkv vitdet.VitDetAttention.qkv
        """,
    ),
    (
        _own_or_crossed,
        """
        decision_transformer.DecisionTransformerGPT2Attention.c_attn gpt2.GPT2Attention.c_attn
        imagegpt.ImageGPTAttention.c_attn
        """,
    ),
    (
        _equal("k", "v"),
        """
        evolla.EvollaSequenceCompressorAttention.to_kv granite_speech.GraniteSpeechConformerAttention.to_kv
        granite_speech_plus.GraniteSpeechPlusConformerAttention.to_kv jetmoe.JetMoeAttention.kv_proj
        """,
    ),
    (
        _by_head("num_heads", "head_dim", "q", "k", "v"),
        "bloom.BloomAttention.query_key_value persimmon.PersimmonAttention.query_key_value",
    ),
    (
        _by_head("config.num_attention_heads", "head_size", "q", "k", "v"),
        "gpt_neox.GPTNeoXAttention.query_key_value",
    ),
    (
        _by_head("num_attention_heads", "head_size", "q", "k", "v"),
        "gpt_neox_japanese.GPTNeoXJapaneseAttention.query_key_value",
    ),
    (
        _by_head("num_attention_heads", "attention_head_size", "q", "k", "v"),
        "deberta.DisentangledSelfAttention.in_proj",
    ),
    (_by_head("num_attention_heads", "head_dim", "q", "k", "v"), "minimax.MiniMaxLightningAttention.qkv_proj"),
    (_by_head("num_heads", "head_width", "q", "k", "v"), "esmfold.EsmFoldSelfAttention.proj"),
    (_falcon, "falcon.FalconAttention.query_key_value"),
    (_gpt_bigcode, "gpt_bigcode.GPTBigCodeAttention.c_attn"),
    (_codegen, "codegen.CodeGenAttention.qkv_proj"),
    (_grouped_heads, "phi3.Phi3Attention.qkv_proj phi4_multimodal.Phi4MultimodalAttention.qkv_proj"),
    (_dbrx, "dbrx.DbrxAttention.Wqkv"),
    (_exaone_vision, "exaone4_5.Exaone4_5_VisionAttention.qkv"),
    (
        _latent,
        """
        axk1.AXK1Attention.kv_b_proj axk2.AXK2Attention.kv_b_proj bailing_hybrid.BailingHybridAttention.kv_b_proj
        deepseek_v2.DeepseekV2Attention.kv_b_proj deepseek_v3.DeepseekV3Attention.kv_b_proj
        deepseek_v32.DeepseekV32Attention.kv_b_proj dots3_note.Dots3NoteTextAttention.kv_b_proj
        glm4_moe_lite.Glm4MoeLiteAttention.kv_b_proj glm5_next.Glm5NextTextAttention.kv_b_proj
        glm_moe_dsa.GlmMoeDsaAttention.kv_b_proj hy_v4.HYV4Attention.kv_b_proj
        kimi_linear.KimiLinearAttention.kv_b_proj longcat_flash.LongcatFlashMLA.kv_b_proj
        minicpm3.MiniCPM3Attention.kv_b_proj mistral4.Mistral4Attention.kv_b_proj
        mistral_large4.MistralLarge4TextAttention.kv_b_proj youtu.YoutuAttention.kv_b_proj
        """,
    ),
    (
        _by_head("config.num_attention_heads", "head_dim", "q", "gate"),
        """
        qwen3_5.Qwen3_5Attention.q_proj qwen3_5_moe.Qwen3_5MoeAttention.q_proj qwen3_next.Qwen3NextAttention.q_proj
        qwen4_exp.Qwen4ExpTextAttention.q_proj
        """,
    ),
    (_gated_query_latent, "axk2.AXK2Attention.q_gate_proj"),
    (
        _delta,
        """
        qwen3_5.Qwen3_5GatedDeltaNet.in_proj_qkv qwen3_5_moe.Qwen3_5MoeGatedDeltaNet.in_proj_qkv
        qwen4_exp.Qwen4ExpTextGatedDeltaNet.in_proj_qkv
        """,
    ),
    (_gated_delta, "qwen3_next.Qwen3NextGatedDeltaNet.in_proj_qkvz"),
    (_mlstm, "xlstm.xLSTMLayer.qkv_opreact"),
    (
        _equal("gate", "up"),
        """
        dia.DiaMLP.gate_up_proj dots3_note.Dots3NoteAudioMLP.gate_up_proj esmfold2.EsmFold2SwiGLU.gate_up_proj
        glm.GlmMLP.gate_up_proj glm4.Glm4MLP.gate_up_proj glm4v.Glm4vTextMLP.gate_up_proj
        glm_image.GlmImageTextMLP.gate_up_proj glm_ocr.GlmOcrTextMLP.gate_up_proj
        granitemoe_swa.GraniteMoeSWAMLP.input_linear granitemoehybrid.GraniteMoeHybridMLP.input_linear
        granitemoeshared.GraniteMoeSharedMLP.input_linear minimax_m3_vl.MiniMaxM3VLDenseMLP.gate_up_proj
        modernbert.ModernBertMLP.Wi modernbert_decoder.ModernBertDecoderMLP.Wi phi3.Phi3MLP.gate_up_proj
        phi4_multimodal.Phi4MultimodalMLP.gate_up_proj zamba2.Zamba2MLP.gate_up_proj
        """,
    ),
    (
        _equal("up", "gate"),
        """
        clvp.ClvpGatedLinearUnit.proj moonshine.MoonshineDecoderMLP.fc1
        moonshine_streaming.MoonshineStreamingDecoderMLP.fc1 phi4_multimodal.Phi4MultimodalAudioMLP.gate_up_proj
        """,
    ),
)
LAYOUTS: dict[str, Rule] = {key: rule for rule, keys in _TABLE for key in keys.split()}


def fused_parts(parent: nn.Module, name: str, path: str, d_out: int) -> Mapping[str, Runs]:
    """Return the parts of a fused projection: rows by name.

    Args:
        parent: the module whose forward splits its output.
        name: the projection's name there.
        path: its path in the model, for the error.
        d_out: its rows.

    Raises:
        UnsupportedLayerError: how this class splits it is not known, or its sizes do not add up.
    """
    kind = host_class(parent)
    known = next((base for base in kind.__mro__ if _key(base, name) in LAYOUTS), None)
    pattern, refusal = None, f"{__name__} lists no '{name}' of {kind.__module__}.{kind.__qualname__}"
    if known is not None:
        refusal = _changed(parent, known)
        try:
            pattern = LAYOUTS[_key(known, name)](parent, d_out)
        except AttributeError as error:
            refusal = refusal or f"its {kind.__name__} has no '{error.name}'"
    if pattern is not None and not refusal and pattern.num_rows() != d_out:
        parts = ", ".join(f"{part}: {size}" for part, size in pattern.sizes.items())
        refusal = f"{kind.__name__} takes {pattern.times} x ({parts}), {pattern.num_rows()} rows, but it has {d_out}"
    if pattern is None or refusal:
        raise UnsupportedLayerError(
            f"which rows of '{path}' are which part is not known: {refusal}. Give rows by number: '{name}[0:64]'."
        )
    return pattern.runs()


def _key(kind: type[nn.Module], name: str) -> str:
    """Return what the table calls the child ``name`` of a class; of a class that is not transformers', no key of it."""
    module = kind.__module__
    file = module.rpartition(".modeling_")[2] if module.startswith("transformers.models.") else module
    return f"{file}.{kind.__qualname__}.{name}"


def _changed(parent: nn.Module, known: type[nn.Module]) -> str:
    """Say which functions this module has in place of those of the class in the table; '' where it has none."""
    kind = host_class(parent)
    if (known.forward.__module__, known.forward.__qualname__) != (known.__module__, f"{known.__qualname__}.forward"):
        return f"the forward of {known.__name__} was replaced by {known.forward.__qualname__}"
    functions = {name for name, value in vars(known).items() if inspect.isroutine(value) and name[:2] != "__"}
    below = kind.__mro__[: kind.__mro__.index(known)]
    own = sorted({name for base in below for name in vars(base)} & functions)
    if own:
        return f"{kind.__name__} has functions of its own in place of {known.__name__}'s: {quoted(own)}"
    hooked = {"forward"} if "_hf_hook" in parent.__dict__ else set()  # accelerate's hook calls the class's own
    on_instance = sorted(set(parent.__dict__) & functions - hooked)
    return f"the instance has functions of its own: {quoted(on_instance)}" if on_instance else ""


class FalconLinearOps(LinearOps):
    """Falcon's own ``Linear``: the same matrix, multiplied and the bias added in two steps."""

    hosts: ClassVar[tuple[str, ...]] = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
