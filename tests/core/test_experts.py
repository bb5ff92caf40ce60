"""Stacked experts of transformers, in every implementation and class there is, and whole models of them."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.adapters.targets import find_sites
from lorakit.errors import LorakitError, RoutingError, UnsupportedLayerError
from lorakit.layers import Site, find_ops

from .models import METHODS, dense_twin, fill_with_noise, method_named, pickled

Build = Callable[..., nn.Module]
SUM_ORDER = 2e-5  # fp32 sums over some ten terms of order 1, in another order
EXPERTS, HIDDEN, INNER, TOKENS = 4, 8, 16, 6


class Sizes:
    """A config that answers whatever a class of experts calls its sizes."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        found = {
            r".*(num|n)_.*experts|num_.*experts|moe_num_experts": EXPERTS,
            r".*act(ivation)?": "silu",
            r".*latent.*": None,
            r".*hidden_size|.*hidden_dim": HIDDEN,
            r".*(intermediate|ffn).*": INNER,
            r".*(limit|softcap)": 100.0,
            r".*alpha": 1.7,
            r".*eps": 1e-5,
        }
        for pattern, value in found.items():
            if re.fullmatch(pattern, name):
                return value
        raise AttributeError(name)


def installed_classes() -> list[tuple[str, str]]:
    """Return module and class of every class that takes transformers' choice of implementations."""
    models = Path(transformers.__file__).parent / "models"
    return [
        (f"transformers.models.{file.parent.name}.{file.stem}", name)
        for file in sorted(models.glob("*/modeling_*.py"))
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", file.read_text("utf-8"), re.MULTILINE)
    ]


CLASSES = dict((name, module) for module, name in installed_classes())
# One of each way to store them: as Mixtral, transposed with biases and woven, without a gate, transposed.
CHOSEN = ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "AriaExperts", "OpenAIPrivacyFilterExperts"]


class Routes(nn.Module):
    """Experts and a choice of two for each token by its numbers alone; tokens are rows."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.experts = getattr(importlib.import_module(CLASSES[name]), name)(Sizes())
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = x[:, :EXPERTS].softmax(dim=1).topk(2, dim=1)
        return index, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.choose(x))


def made(name: str, method: str = "lora", targets: str = "experts", **fields: object) -> tuple[Routes, Handle]:
    model = Routes(name).eval()
    handle = lk.attach(model, method_named(method, rank=2, **fields), targets)
    fill_with_noise(handle)
    return model, handle


def test_the_classes_are_found() -> None:
    assert set(CHOSEN) <= set(CLASSES)
    assert len(CLASSES) > 20


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_every_installed_class_is_adapted_and_merges_to_the_same(name: str) -> None:
    model, handle = made(name)
    x = torch.randn(TOKENS, HIDDEN)
    with handle.disabled():
        base = model(x)
    adapted = model(x)
    assert (adapted - base).abs().max() > 100 * SUM_ORDER
    assert all(site.stack == (EXPERTS,) for site in find_sites(model, "experts"))
    handle.merge()
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "NemotronHExperts"])
@torch.no_grad()
def test_the_parts_gate_and_up_are_what_the_class_makes_of_them(name: str) -> None:
    experts = Routes(name).experts
    ops = find_ops(experts)
    assert ops is not None
    parts = ops.parts(experts)
    assert list(parts) == ["gate", "up"]
    taken = torch.zeros(2 * INNER)
    for value, runs in enumerate(parts.values(), start=1):
        for start, stop in runs:
            taken[start:stop] += value
    assert sorted(taken.tolist()) == [1.0] * INNER + [2.0] * INNER

    def bend(part: int) -> float:
        """Return by how much what the class makes of the rows is not linear along some of them."""
        z, step, apply = torch.randn(50, 2 * INNER), torch.where(taken == part, 0.5, 0.0), experts._apply_gate
        return float((apply(z + step) - 2 * apply(z) + apply(z - step)).abs().max())

    # What is up is multiplied by the gate, within a soft bound at most; the gate goes through an activation.
    assert bend(2) < 0.05 * bend(1)


def by_the_dense_weights(model: Routes, handle: Handle, x: Tensor) -> Tensor:
    """Return what an expert at a time computes with W + delta, by the class's own loop."""
    plain = dense_twin(model, handle)
    plain.get_submodule("experts").config._experts_implementation = "eager"
    return plain(x)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_implementation_computes_the_dense_truth(method: str, name: str, implementation: str) -> None:
    model, handle = made(name, method)
    x = torch.randn(TOKENS, HIDDEN)
    truth = by_the_dense_weights(model, handle, x)
    model.experts.config._experts_implementation = implementation
    with handle.disabled():
        base = model(x)
    assert (truth - base).abs().max() > 100 * SUM_ORDER
    torch.testing.assert_close(model(x), truth, rtol=0, atol=SUM_ORDER)
    with torch.enable_grad():
        torch.testing.assert_close(model(x).detach(), truth, rtol=0, atol=SUM_ORDER)
    with handle.routed([None, "default", "default", None, "default", None]):
        mixed = model(x)
    assert torch.equal(mixed[[0, 3, 5]], base[[0, 3, 5]])
    torch.testing.assert_close(mixed[[1, 2, 4]], truth[[1, 2, 4]], rtol=0, atol=SUM_ORDER)
    handle.merge()
    torch.testing.assert_close(model(x), truth, rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_experts_that_got_no_token_get_a_gradient_of_zero(name: str, implementation: str) -> None:
    model, handle = made(name)
    model.experts.config._experts_implementation = implementation
    x = torch.randn(TOKENS, HIDDEN)
    x[:, :EXPERTS] = torch.tensor([0.0, 3.0, 2.0, -1.0])  # every token goes to the experts 1 and 2
    model(x).square().sum().backward()
    for path in handle.updates():
        for letter in "AB":
            gradient = handle.parameters()[f"{path}.{letter}"].grad
            assert gradient is not None
            assert not gradient[[0, 3]].any()
            assert gradient[[1, 2]].flatten(1).any(dim=1).all()


def test_an_update_is_a_pair_for_each_expert() -> None:
    _, handle = made("GptOssExperts")
    sizes = {path: tuple(p.shape) for path, p in handle.parameters().items()}
    assert sizes == {
        "experts.gate_up_proj.A": (EXPERTS, 2, HIDDEN),
        "experts.gate_up_proj.B": (EXPERTS, 2 * INNER, 2),
        "experts.down_proj.A": (EXPERTS, 2, INNER),
        "experts.down_proj.B": (EXPERTS, HIDDEN, 2),
    }
    assert handle.counts().updates == EXPERTS * 2 * (HIDDEN + 2 * INNER + INNER + HIDDEN)
    assert handle.delta("experts.gate_up_proj").shape == (EXPERTS, 2 * INNER, HIDDEN)
    A, B = (handle.parameters()[f"experts.down_proj.{letter}"].detach() for letter in "AB")
    scale = handle.entry("default").method.scale_at("experts.down_proj")
    torch.testing.assert_close(handle.delta("experts.down_proj")[2], scale * B[2] @ A[2])


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@torch.no_grad()
def test_a_part_changes_its_own_rows(name: str) -> None:
    model, handle = made(name, targets="experts[gate]")
    assert list(handle.updates()) == ["experts.gate_up_proj[gate]"]
    before = Site.at(model, "experts.gate_up_proj").matrix().clone()
    delta = handle.delta("experts.gate_up_proj[gate]")
    assert delta.shape == (EXPERTS, INNER, HIDDEN)
    matrices = EXPERTS * (2 * INNER * HIDDEN + INNER * HIDDEN)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert (handle.coverage().reached, handle.coverage().total) == (EXPERTS * INNER * HIDDEN, matrices + biases)
    handle.merge()
    change = Site.at(model, "experts.gate_up_proj").matrix() - before
    rows = slice(0, INNER) if name == "MixtralExperts" else slice(0, None, 2)  # as each class's _apply_gate takes them
    torch.testing.assert_close(change[:, rows], delta, rtol=0, atol=1e-6)
    change[:, rows] = 0
    assert not change.any()


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("MixtralExperts", "experts.gate_proj", "no layer matches target 'experts.gate_proj'"),
        ("MixtralExperts", "experts.gate_up_proj[q]", "'experts.gate_up_proj' has no part 'q'. It has 'gate', 'up'"),
        ("MixtralExperts", "experts.down_proj[gate]", "which rows of 'experts.down_proj' are which part is not known"),
        ("NemotronHExperts", "experts.gate_up_proj", "no layer matches target 'experts.gate_up_proj'"),
        ("NemotronHExperts", "experts[gate]", "which rows of 'experts.up_proj' are which part is not known"),
        ("GptOssExperts", "experts.down_proj_bias", "no layer matches target 'experts.down_proj_bias'"),
    ],
)
def test_a_name_that_is_not_there_is_refused_by_name(name: str, target: str, why: str) -> None:
    with pytest.raises(LorakitError, match=re.escape(why)):
        lk.attach(Routes(name), lk.LoRA(rank=2), target)


def test_quantised_experts_are_refused_by_name() -> None:
    model = Routes("MixtralExperts")
    model.experts.down_proj = nn.Parameter(model.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match=r"'experts' .*its weights down_proj are quantised"):
        lk.attach(model, lk.LoRA(rank=2), "experts")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_the_biases_of_experts_are_trained_and_merged(bias: str) -> None:
    model, handle = made("GptOssExperts", targets="experts.down_proj", bias=bias)
    expected = {"experts.down_proj"} if bias == "lora_only" else {"experts.down_proj", "experts.gate_up_proj"}
    assert set(handle.state().biases) == expected
    x = torch.randn(TOKENS, HIDDEN)
    model(x).sum().backward()
    assert all(p.grad is not None for p in handle.parameters().values())
    with torch.no_grad():
        adapted = model(x)
        handle.merge()
        torch.testing.assert_close(model(x), adapted, rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@torch.no_grad()
def test_a_copy_computes_the_same_and_is_detached_by_itself(way: Callable[[nn.Module], nn.Module]) -> None:
    model, handle = made("GptOssExperts", targets="experts[gate],down_proj")
    x = torch.randn(TOKENS, HIDDEN)
    adapted = model(x)
    model.experts.config = None  # the stand-in of this test's config is no value to pickle
    clone = way(model)
    for each in (model, clone):
        each.get_submodule("experts").config = Sizes()
    assert torch.equal(clone(x), adapted)
    other = lk.handle_of(clone)
    assert other is not None
    other.detach()
    with handle.disabled():
        assert torch.equal(clone(x), model(x))
    assert torch.equal(model(x), adapted)


# Whole models ---------------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    return MixtralForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    return GptOssForCausalLM(config).eval()


WHOLE = {"mixtral": mixtral, "gpt-oss": gpt_oss}
whole = pytest.mark.parametrize("name", WHOLE)
FORWARD = 1e-4  # fp32 sums in another order, through two blocks with norms


@whole
def test_the_words_mean_experts_and_no_router(name: str) -> None:
    model = WHOLE[name]()
    mlp = [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")]
    assert [site.path for site in find_sites(model, "mlp")] == mlp
    everything = {site.path for site in find_sites(model, "all-linear")}
    assert set(mlp) <= everything
    assert not any("gate." in path or "router" in path or path.endswith("gate") for path in everything)
    assert len(everything) == 2 * (4 + 2)


@whole
def test_a_whole_model_is_verified_routed_by_position_merged_and_saved(name: str, tokens: Tensor) -> None:
    model = WHOLE[name]()
    with torch.no_grad():
        base = model(tokens).logits
        handle = lk.attach(model, lk.LoRA(rank=2))
        assert torch.equal(model(tokens).logits, base)
    assert handle.verify(tokens).num_sites == 12
    fill_with_noise(handle)
    with torch.no_grad():
        adapted, state = model(tokens).logits, handle.state()
        with handle.routed([["default"] * 6, *[[None] * 6] * 2, ["default"] * 6]):
            mixed = model(tokens).logits
        torch.testing.assert_close(mixed[[0, 3]], adapted[[0, 3]], rtol=0, atol=FORWARD)
        assert torch.equal(mixed[[1, 2]], base[[1, 2]])
        handle.merge()
        torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=FORWARD)
        handle.unmerge()
        handle.detach()
        assert torch.equal(model(tokens).logits, base)
        Handle(model).add_state(state)
        torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=FORWARD)


def test_one_adapter_per_row_is_refused_where_experts_see_tokens_of_all_rows(tokens: Tensor) -> None:
    model = mixtral()
    handle = lk.attach(model, lk.LoRA(rank=2), "attention", name="attention")
    handle.add("experts", lk.LoRA(rank=2), "mlp")
    with torch.no_grad():
        with handle.routed(["attention", None, None, "attention"]):
            model(tokens)
        match = r"4 rows meets a layer whose input has 24 positions.*one adapter per position"
        with pytest.raises(RoutingError, match=match), handle.routed(["experts", None, None, "attention"]):
            model(tokens)


def test_a_routed_batch_generates_what_each_row_generates_alone(tokens: Tensor) -> None:
    model = mixtral()
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=8))
    fill_with_noise(handle, size=0.5)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    route = ["default", None]
    with handle.routed([[name] * 6 for name in route]):
        mixed = model.generate(tokens[:2], attention_mask=torch.ones_like(tokens[:2]), **settings)
    for row, name in enumerate(route):
        with handle.using(name):
            alone = model.generate(tokens[row : row + 1], attention_mask=torch.ones(1, 6).long(), **settings)
        assert torch.equal(mixed[row : row + 1], alone)


@pytest.mark.parametrize("reentrant", [True, False])
@whole
def test_checkpointing_gives_the_gradients_without_it(name: str, reentrant: bool, tokens: Tensor) -> None:
    model = WHOLE[name]()
    handle = lk.attach(model, lk.LoRA(rank=2), f"all-linear,{'gate' if name == 'mixtral' else 'router'}.weight")
    fill_with_noise(handle)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.train()(tokens, labels=tokens).loss.backward()
        return {key: p.grad.clone() for key, p in handle.parameters().items() if p.grad is not None}

    expected = gradients()
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == expected.keys() == handle.parameters().keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize(("name", "router"), [("mixtral", "gate"), ("gpt-oss", "router")])
def test_a_routers_weight_is_adapted_where_it_is_named(name: str, router: str, tokens: Tensor) -> None:
    model = WHOLE[name]()
    handle = lk.attach(model, lk.DoRA(rank=2), f"{router}.weight")
    assert list(handle.updates()) == [f"model.layers.{i}.mlp.{router}.weight" for i in (0, 1)]
    assert handle.verify(tokens).num_sites == 2
    fill_with_noise(handle, size=0.05)
    with torch.no_grad():
        adapted = model(tokens).logits
        handle.merge()
        torch.testing.assert_close(model(tokens).logits, adapted, rtol=0, atol=FORWARD)
