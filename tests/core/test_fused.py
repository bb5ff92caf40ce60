"""Which rows of a fused projection are q, k and v: what each class of transformers does with every single row.

No test reads a split from the class's code. A hook moves one column of the projection's output at one
token, and what the module makes of it tells what that row is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.targets import find_sites
from lorakit.errors import TargetError, UnsupportedLayerError
from lorakit.layers.fused import LAYOUTS, Pattern, fused_parts

from .fused_classes import CASES, FORMS, HEADS, WIDTH, Case, num_rows
from .models import OneLayer

TOKEN, STEP = 2, 0.7  # a token that sees others and that others see; a step that bends a softmax
# How far from a straight line rounding takes a value's effect, relative to the effect: below 2e-14 (fp32:
# 7e-7) in all cases below, where a softmax or an activation bends by 6e-4 (fp32: 1e-2) at least.
STRAIGHT = {torch.float64: 1e-9, torch.float32: 3e-5}


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a step of one column at one token changes.

    Attributes:
        tokens: the places of the watched tensor that it moves.
        channels: how many of its channels.
        straight: twice the step moves it twice as far.
        counts: whether the module's output moves at all.
    """

    tokens: tuple[int, ...]
    channels: int
    straight: bool
    counts: bool


def softmax(effect: Effect) -> str:
    """A query changes its own token's output alone; a value moves it in a straight line, a key bends it."""
    if effect.tokens == (TOKEN,):
        return "q"
    return "v" if effect.straight else "k"


def gated_query(effect: Effect) -> str:
    """Beside a query, which changes all of its head's channels, a gate scales one."""
    return "gate" if effect.channels == 1 else "q"


def linear(effect: Effect) -> str:
    """A value's channel goes into one channel of the state, a key into all, and a gate acts after the mixing."""
    if not effect.tokens:
        return "gate"
    if effect.tokens == (TOKEN,):
        return "q"
    return "v" if effect.channels == 1 else "k"


def channels(effect: Effect) -> str:
    """Attention of channels to channels: values stay at their token, and a query is of one channel."""
    if effect.tokens == (TOKEN,):
        return "v"
    return "q" if effect.channels == 1 else "k"


def unit(effect: Effect) -> str:
    """What is multiplied moves the output in a straight line, what is activated bends it."""
    return "up" if effect.straight else "gate"


ROLES: dict[str, Callable[[Effect], str]] = {
    "softmax": softmax,
    "gated query": gated_query,
    "linear": linear,
    "channels": channels,
    "unit": unit,
}


class Probe:
    """Runs a case's module with one column of its projection's output moved."""

    def __init__(self, case: Case) -> None:
        self.module = case.module()
        self.case = case
        self.inputs = case.inputs_of(self.module)
        self.column: int | None = None
        self.step = 0.0
        self.watched: Tensor | None = None
        self.module.get_submodule(case.child).register_forward_hook(self._move)
        if case.watch:
            self.module.get_submodule(case.watch).register_forward_pre_hook(self._watch)
        self.plain_out, self.plain = self.run(None, 0.0)

    def _move(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.column is None:
            return out
        moved = out.clone()
        moved.view(-1, out.shape[-1])[TOKEN, self.column] += self.step
        return moved

    def _watch(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.watched = args[0]

    @torch.no_grad()
    def run(self, column: int | None, step: float) -> tuple[Tensor, Tensor]:
        """Return the module's output and the watched tensor, both ``[tokens, channels]``."""
        self.column, self.step = column, step
        out = self.module(**self.inputs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        out = out.reshape(-1, out.shape[-1])
        return out, out if self.watched is None else self.watched.reshape(len(out), -1)

    def effect(self, column: int) -> Effect:
        """Compare with the module as it is: what a column does not reach keeps its bits."""
        out, seen = self.run(column, STEP)
        once, twice = seen - self.plain, self.run(column, 2 * STEP)[1] - self.plain
        moved = once != 0
        return Effect(
            tokens=tuple(moved.any(dim=1).nonzero().flatten().tolist()),
            channels=int(moved.any(dim=0).sum()),
            straight=bool((twice - 2 * once).abs().max() <= STRAIGHT[self.case.dtype] * twice.abs().max()),
            counts=not torch.equal(out, self.plain_out),
        )


def names_of_rows(module: nn.Module, child: str) -> list[str]:
    """Return what the table says each row is."""
    rows = num_rows(module, child)
    found = [""] * rows
    for name, runs in fused_parts(module, child, child, rows).items():
        for start, stop in runs:
            found[start:stop] = [found[i] + name for i in range(start, stop)]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_is_what_the_class_uses_it_as(case: Case) -> None:
    probe = Probe(case)
    effects = [probe.effect(column) for column in range(num_rows(probe.module, case.child))]
    assert all(effect.counts for effect in effects)
    assert names_of_rows(probe.module, case.child) == [ROLES[case.kind](effect) for effect in effects]


@pytest.mark.parametrize("ending", [ending for endings, _ in FORMS for ending in endings])
def test_a_form_that_is_tried_is_in_the_table(ending: str) -> None:
    assert any(key.endswith(ending) for key in LAYOUTS)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_patterns_parts_are_all_rows_once(times: int) -> None:
    pattern = Pattern(times, {"q": 4, "v": 1, "k": 2})
    rows = [row for runs in pattern.runs().values() for start, stop in runs for row in range(start, stop)]
    assert sorted(rows) == list(range(pattern.num_rows()))


def gpt2_attention() -> nn.Module:
    return next(case for case in CASES if case.key == "gpt2.GPT2Attention.c_attn").module()


def of_class(changes: dict[str, object]) -> nn.Module:
    """Return a GPT-2 attention of a class below the one in the table."""
    attention = gpt2_attention()
    attention.__class__ = type("MyAttention", (type(attention),), changes)
    return attention


def refusal(attention: nn.Module, child: str = "c_attn") -> str:
    """Return why the parts of a projection in a model are refused."""
    model = OneLayer(attention)
    with pytest.raises(UnsupportedLayerError) as caught:
        find_sites(model, f"{child}[q]")
    return str(caught.value)


def test_a_class_that_inherits_every_function_is_covered() -> None:
    parts = {site.path for site in find_sites(OneLayer(of_class({"note": "mine"})), "c_attn[q,v]")}
    assert parts == {"layer.c_attn[q]", "layer.c_attn[v]"}


def test_a_class_with_a_forward_of_its_own_is_refused_by_name() -> None:
    own = of_class({"forward": lambda self, hidden_states: self.c_attn(hidden_states)})
    assert "MyAttention has functions of its own in place of GPT2Attention's: 'forward'" in refusal(own)


def test_a_class_with_another_function_of_the_attention_is_refused_by_name() -> None:
    own = of_class({"_upcast_and_reordered_attn": lambda self, *args: args})
    message = "MyAttention has functions of its own in place of GPT2Attention's: '_upcast_and_reordered_attn'"
    assert message in refusal(own)


def test_a_replaced_forward_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return hidden_states

    attention = gpt2_attention()
    monkeypatch.setattr(type(attention), "forward", quick_forward)
    assert "the forward of GPT2Attention was replaced by" in refusal(attention)
    assert "quick_forward" in refusal(attention)


def test_a_forward_of_the_instance_is_refused_by_name() -> None:
    attention = gpt2_attention()
    attention.forward = lambda hidden_states: hidden_states
    assert "the instance has functions of its own: 'forward'" in refusal(attention)


def test_accelerates_hook_changes_no_layout() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    attention = gpt2_attention()
    add_hook_to_module(attention, ModelHook())
    assert len(find_sites(OneLayer(attention), "c_attn[q,v]")) == 2


def test_an_unknown_module_is_told_to_give_rows() -> None:
    message = refusal(nn.ModuleDict({"to_qkv": nn.Linear(8, 24)}), "to_qkv")
    assert "which rows of 'layer.to_qkv' are which part is not known" in message
    assert "'to_qkv[0:64]'" in message


def test_another_layer_of_a_known_class_has_no_parts() -> None:
    message = refusal(gpt2_attention(), "c_proj")
    assert "lorakit.layers.fused lists no 'c_proj' of transformers.models.gpt2.modeling_gpt2.GPT2Attention" in message


def bloom_attention() -> nn.Module:
    return next(case for case in CASES if case.key == "bloom.BloomAttention.query_key_value").module()


def test_sizes_that_do_not_add_up_are_refused_with_both_counts() -> None:
    attention = bloom_attention()
    attention.num_heads = HEADS + 1
    message = f"BloomAttention takes 5 x (q: 6, k: 6, v: 6), 90 rows, but it has {3 * WIDTH}"
    assert message in refusal(attention, "query_key_value")


def test_a_size_that_the_module_lacks_is_refused_by_name() -> None:
    attention = bloom_attention()
    del attention.head_dim
    assert "its BloomAttention has no 'head_dim'" in refusal(attention, "query_key_value")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("c_attn[gate]", r"'layer\.c_attn' has no part 'gate'\. It has 'q', 'k', 'v'"),
        ("c_attn[q,up]", r"'layer\.c_attn' has no part 'up'"),
        ("c_attn[0:73]", r"'layer\.c_attn\[0:73\]': there are rows 0 to 72"),
        ("c_attn[5:5]", r"'layer\.c_attn\[5:5\]'"),
        ("c_attn[9:5]", r"'layer\.c_attn\[9:5\]'"),
        ("c_attn[q,0:1]", r"'layer\.c_attn\[q\]' and 'layer\.c_attn\[0:1\]' are rows of one matrix and overlap"),
        ("c_attn[20:30,q]", r"'layer\.c_attn\[20:30\]' and 'layer\.c_attn\[q\]' are rows of one matrix and overlap"),
        ("c_attn,c_attn[q]", r"'layer\.c_attn' and 'layer\.c_attn\[q\]' are rows of one matrix and overlap"),
        ("c_attn[x]", r"no layer matches target 'c_attn\[x\]'"),
    ],
)
def test_parts_that_cannot_be_meant_are_refused_by_name(entry: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        find_sites(OneLayer(gpt2_attention()), entry)


def test_a_cross_attention_has_no_q_in_its_packed_projection() -> None:
    crossed = next(case for case in CASES if case.arguments.get("is_cross_attention"))
    with pytest.raises(TargetError, match=r"has no part 'q'\. It has 'k', 'v'"):
        find_sites(OneLayer(crossed.module()), "c_attn[q]")


def test_a_cross_attention_whose_forward_splits_one_head_only_is_refused() -> None:
    case = Case(
        "gpt_bigcode.GPTBigCodeAttention.c_attn",
        fields={"multi_query": False},
        arguments={"is_cross_attention": True},
    )
    assert f"takes 1 x (k: 6, v: 6), 12 rows, but it has {2 * WIDTH}" in refusal(case.module())
