"""Adapters of every kind of layer as folders: read back bit for bit, and by PEFT the same or not at all."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import Handle, attach, handle_of
from lorakit.formats import PeftFormat, load_adapter, save_adapter
from lorakit.methods import Method
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA

from ..core.models import KINDS, ROWS, OneLayer, one_layer, sites_of_kind
from .models import FP32_TOLERANCE, shake
from .test_peft_format import assert_same

peft = pytest.importorskip("peft", reason="what PEFT makes of a folder needs the real peft, from the extra 'test'")

# torch says so of every projected LSTM on a CPU
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

# Ranks are 3 and 2, alpha is neither: a scale left out or taken from the wrong place shows.
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=5),
    "dora": DoRA(rank=3, alpha=5),
    "rslora": LoRA(rank=3, alpha=5, scaling="rslora"),
    "bias": LoRA(rank=3, alpha=5, bias="lora_only"),
    "rank pattern": LoRA(rank=3, alpha=5, rank_pattern={".*": 2}),
    "one rank": LoRA(rank=3, alpha=5),  # of the first site only, see method_for
}
# Trained biases need a bias, and one of several ranks needs several sites.
CELLS = [
    (method, kind)
    for kind in KINDS
    for method in METHODS
    if method != "bias" or any(site.ops.bias(site.layer) is not None for site in sites_of_kind(one_layer(kind), kind))
    if method != "one rank" or len(sites_of_kind(one_layer(kind), kind)) > 1
]
cells = pytest.mark.parametrize(("method", "kind"), CELLS)

EVERY = set(METHODS)
NO_VECTORS = EVERY - {"dora", "bias", "one rank"}  # parts of a layer: PEFT needs all rows' vectors, and one scale
PEFT_COMPUTES: dict[str, set[str]] = {
    "linear": EVERY,
    "linear without bias": EVERY,
    "linear in parts": NO_VECTORS,
    "embedding": EVERY,
    "embedding with padding": EVERY,
    "embedding scaled": EVERY,
    "transposed": EVERY,
    "transposed in parts": NO_VECTORS,
    "attention": EVERY - {"dora"},
    "attention in parts": NO_VECTORS,
    "experts": EVERY - {"dora"},
    "experts with biases": EVERY - {"dora"},
}
# PEFT convolves with A by the host's size, stride and padding only, and knows no separate projections.
NOT_THIS_UPDATE = {kind for kind in KINDS if re.match(r"conv\dd", kind)} | {"attention apart", *PEFT_COMPUTES}


def method_for(name: str, kind: str) -> Method:
    if name != "one rank":
        return METHODS[name]
    first = sites_of_kind(one_layer(kind), kind)[0].path
    return METHODS[name].replaced(rank_pattern={re.escape(first): 2})


def trained(method: str, kind: str) -> tuple[OneLayer, Handle, Tensor]:
    model = one_layer(kind).eval()
    handle = attach(model, method_for(method, kind), KINDS[kind].target)
    shake(handle.parameters().values())
    return model, handle, KINDS[kind].inputs(ROWS)


def base_of(model: nn.Module) -> nn.Module:
    """Return the model as it was before anything was attached."""
    base = copy.deepcopy(model)
    handle = handle_of(base)
    assert handle is not None
    return handle.detach()


@cells
@torch.no_grad()
def test_every_adapter_comes_back_bit_for_bit(method: str, kind: str, tmp_path: Path) -> None:
    model, handle, x = trained(method, kind)
    state, expected = handle.state(), model(x)
    save_adapter(handle, tmp_path)

    again = base_of(model)
    assert_same(load_adapter(again, tmp_path).state(), state)
    assert torch.equal(again(x), expected)


@cells
def test_the_files_say_all_of_an_adapter_without_the_model(method: str, kind: str) -> None:
    _, handle, _ = trained(method, kind)
    state = handle.state()
    found = PeftFormat().decode(PeftFormat().encode(state))
    assert_same(found, state, scaled_embeddings=False)
    assert list(found.sites) == list(state.sites)


@cells
@torch.no_grad()
def test_peft_computes_the_same_or_refuses(method: str, kind: str, tmp_path: Path) -> None:
    model, handle, x = trained(method, kind)
    expected, base = model(x), base_of(model)
    before = base(x)
    save_adapter(handle, tmp_path)

    if method in PEFT_COMPUTES.get(kind, ()):
        found = peft.PeftModel.from_pretrained(base, tmp_path)(x)
        torch.testing.assert_close(found, expected, atol=FP32_TOLERANCE, rtol=0)
        assert (expected - before).abs().max() > 100 * FP32_TOLERANCE
    elif kind in NOT_THIS_UPDATE:
        with pytest.raises(KeyError, match="LORAKIT"):
            peft.PeftModel.from_pretrained(base, tmp_path)
    else:
        with pytest.raises(ValueError, match=r"Target module .* is not supported"):
            peft.PeftModel.from_pretrained(base, tmp_path)
