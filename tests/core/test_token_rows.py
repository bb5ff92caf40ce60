"""Rows of tokens trained whole, in an embedding and a head: the contract, ties, identity, refusals."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.adapters.identity import compare, identify
from lorakit.errors import ShapeError, TargetError, UnsupportedLayerError

from .models import Tower, fill_with_noise, tokens_for, train_some_steps

# fp32 sums in another order, and a row as base + (row - base); the terms here are of order 1 to 10.
SUM_ORDER = 2e-5
VOCABULARY, WIDTH = 13, 8
ROWS = "embed[10:13],head[10:13]"


def _scaled(model: Tower) -> Tower:
    model.embed = Gemma3TextScaledWordEmbedding(VOCABULARY, WIDTH, 0, embed_scale=2.5)
    return model


def _biased(model: Tower) -> Tower:
    model.head = nn.Linear(WIDTH, VOCABULARY)
    return model


MODELS: dict[str, Callable[[], Tower]] = {
    "tied": lambda: Tower(tied=True),
    "untied": Tower,
    "scaled": lambda: _scaled(Tower()),
    "head with bias": lambda: _biased(Tower()),
    "bf16": lambda: Tower().bfloat16(),
}
CASES = {
    **{name: (make, ROWS) for name, make in MODELS.items()},
    "embedding alone": (Tower, "embed[10:13]"),
    "head alone": (Tower, "head[0:1]"),
    "several runs": (Tower, "embed[2:4,7:8,12:13],head[7:8,12:13]"),
    "tied, named once": (lambda: Tower(tied=True), "head[3:5]"),
}
cases = pytest.mark.parametrize("case", CASES)


def attached(case: str, targets: str = "up,down") -> tuple[Tower, Handle, Tensor]:
    make, rows = CASES[case]
    model = make().eval()
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=3), targets, train_modules=rows)
    return model, handle, torch.cat([tokens_for(), torch.arange(VOCABULARY)[None, :6], torch.arange(7, 13)[None]])


def trained(case: str) -> tuple[Tower, Handle, Tensor]:
    model, handle, x = attached(case)
    train_some_steps(model, handle, x)
    return model, handle, x


def tolerance(model: nn.Module) -> float:
    """Return the bound on another order of sums; bf16 has 2**-8 of numbers up to 8 in each of a few roundings."""
    return 0.25 if next(model.parameters()).dtype == torch.bfloat16 else SUM_ORDER


@cases
def test_attaching_leaves_the_output_unchanged_at_step_0(case: str) -> None:
    model, handle, x = attached(case)
    out = model(x)
    with handle.disabled():
        assert torch.equal(model(x), out)


@cases
def test_training_leaves_every_bit_of_the_base(case: str) -> None:
    model, handle, x = attached(case)
    before = handle.digest()
    train_some_steps(model, handle, x)
    assert handle.digest() == before


@cases
def test_training_moves_the_rows(case: str) -> None:
    _, handle, _ = attached(case)
    start = {name: p.detach().clone() for name, p in handle.parameters().items() if name.endswith(".rows")}
    train_some_steps(handle.model, handle, tokens_for())
    assert start
    assert all(not torch.equal(handle.parameters()[name], rows) for name, rows in start.items())


@cases
def test_merged_equals_unmerged(case: str) -> None:
    model, handle, x = trained(case)
    unmerged = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), unmerged, rtol=0, atol=tolerance(model))


@cases
def test_unmerging_restores_every_bit_and_the_same_tensors(case: str) -> None:
    model, handle, x = trained(case)
    before, out, table = handle.digest(), model(x), model.embed.weight
    handle.merge()
    handle.unmerge()
    assert handle.digest() == before
    assert torch.equal(model(x), out)
    assert model.embed.weight is table


@cases
def test_a_saved_adapter_comes_back_bit_for_bit(case: str) -> None:
    model, handle, x = trained(case)
    state, out = handle.state(), model(x)
    again = Handle(copy.deepcopy(handle.detach()))
    again.add_state(state)
    assert torch.equal(again.model(x), out)
    assert again.state().rows.keys() == state.rows.keys()


@cases
def test_a_row_in_a_mixed_batch_equals_the_row_alone(case: str) -> None:
    model, handle, x = trained(case)
    handle.add("second", lk.LoRA(rank=3), "up", train_modules=CASES[case][1])
    fill_with_noise(handle, "second")
    route = ["default", None, "second", "default", None, "second"]
    with handle.routed(route):
        mixed = model(x)
    for row, name in enumerate(route):
        with handle.using(name):
            alone = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=tolerance(model))


@cases
def test_rows_of_the_base_in_a_mixed_batch_have_the_bases_bits(case: str) -> None:
    model, handle, x = trained(case)
    with handle.disabled():
        base = model(x)
    with handle.routed([None, "default", None, None, None, "default"]):
        mixed = model(x)
    assert torch.equal(mixed[[0, 2, 3, 4]], base[[0, 2, 3, 4]])


@cases
def test_only_the_adapters_parameters_get_gradients(case: str) -> None:
    model, handle, x = trained(case)
    model.train()(x).square().sum().backward()
    own = {id(parameter) for parameter in handle.parameters().values()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == own


@cases
def test_the_whole_is_one_graph(case: str) -> None:
    model, _, x = trained(case)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=tolerance(model))


@cases
def test_detaching_gives_the_untouched_base_back(case: str) -> None:
    model = CASES[case][0]().eval()
    x = tokens_for()
    before = model(x)
    handle = lk.attach(model, lk.LoRA(rank=2), "up", train_modules=CASES[case][1])
    train_some_steps(model, handle, x)
    handle.detach()
    assert torch.equal(model(x), before)
    assert type(model.embed) in (nn.Embedding, Gemma3TextScaledWordEmbedding)


@cases
def test_half_the_strength_is_half_the_change_of_the_rows(case: str) -> None:
    _, handle, _ = trained(case)
    path = next(iter(handle.state().rows))
    change = handle.delta(path)
    table = handle.model.get_submodule(path.partition("[")[0]).weight.clone().float()
    handle.merge({"default": 0.5})
    moved = handle.model.get_submodule(path.partition("[")[0]).weight.float() - table
    expected = change.t() if path.startswith("embed") else change
    changed = moved[moved.abs().sum(1) > 0]
    torch.testing.assert_close(changed, 0.5 * expected, rtol=0, atol=0.05 if "bf16" in case else SUM_ORDER)


def test_no_gradient_has_the_size_of_the_table() -> None:
    model, _, x = attached("untied")
    sizes: list[tuple[int, ...]] = []
    out = model.train()(x)
    hooks = []
    seen = set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        hooks.append(node.register_hook(lambda gives, _: sizes.extend(tuple(g.shape) for g in gives if g is not None)))
        nodes += [following for following, _ in node.next_functions]
    out.sum().backward()
    assert (3, WIDTH) in sizes
    assert not {(VOCABULARY, WIDTH), (WIDTH, VOCABULARY)} & set(sizes)


def test_tied_tables_share_one_copy() -> None:
    _, handle, _ = attached("tied")
    plain = lk.attach(Tower(tied=True), lk.LoRA(rank=2, alpha=3), "up,down")
    assert [name for name in handle.parameters() if name.endswith(".rows")] == ["embed[10:13].rows"]
    assert handle.counts().updates - plain.counts().updates == 3 * WIDTH
    assert list(handle.state().rows) == ["embed[10:13]"]


def test_a_merged_tie_stays_a_tie() -> None:
    model, handle, _ = trained("tied")
    assert handle.merge().untied == []
    assert model.head.weight is model.embed.weight


def test_untied_tables_have_a_copy_each() -> None:
    _, handle, _ = attached("untied")
    assert list(handle.state().rows) == ["embed[10:13]", "head[10:13]"]


def test_rows_are_no_update_of_the_method() -> None:
    _, handle, _ = attached("untied")
    assert not any("embed" in path or "head" in path for path in handle.updates())


# Identity -------------------------------------------------------------------------------------------


def grown(model: Tower, rows: int, seed: int) -> Tower:
    """Return a copy with more tokens, whose rows come from ``seed``."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.embed, model.head):
        more = torch.randn(rows, WIDTH, generator=generator)
        layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), more]))
    if model.head.bias is not None:
        model.head.bias = nn.Parameter(torch.cat([model.head.bias.detach(), torch.randn(rows, generator=generator)]))
    model.embed.num_embeddings = model.head.out_features = VOCABULARY + rows
    return model


@pytest.mark.parametrize("name", ["untied", "head with bias"])
def test_the_identity_is_that_of_the_base_before_it_grew(name: str) -> None:
    base = MODELS[name]()
    handle = lk.attach(grown(base, 2, seed=1), "lora", "up", train_modules="embed[13:15],head[13:15]")
    assert compare(handle.identity(), base) is None
    assert compare(handle.identity(), grown(base, 2, seed=2)) is None


def test_other_values_in_other_rows_are_another_base() -> None:
    base = Tower()
    handle = lk.attach(grown(base, 2, seed=1), "lora", "up", train_modules="embed[13:15],head[13:15]")
    other = grown(base, 2, seed=1)
    with torch.no_grad():
        other.embed.weight[0, 0] += 1
    mismatch = compare(handle.identity(), other)
    assert mismatch is not None
    assert "first in 'embed.weight'" in mismatch.message


def test_rows_in_the_middle_do_not_count() -> None:
    base = Tower()
    saved = identify(base, ["embed[0:2,5:6]"])
    with torch.no_grad():
        base.embed.weight[[0, 1, 5]] = 7.0
    assert compare(saved, base) is None


def test_new_rows_that_are_not_trained_are_of_the_base() -> None:
    base = Tower()
    handle = lk.attach(grown(base, 2, seed=1), "lora", "up")
    mismatch = compare(handle.identity(), base)
    assert mismatch is not None
    assert mismatch.kind == "structure"


# Refusals -------------------------------------------------------------------------------------------

REFUSED = {
    "embed[10:14]": r"'embed\[10:14\]': there are tokens 0 to 13",
    "head[10:14]": r"'head\[10:14\]': there are rows 0 to 13",
    "embed[0:13]": "is all of it: name 'embed' to train it in full",
    "embed[5:7,6:8]": "in rising order",
    "embed[q]": "named by number",
    "embbed[0:2]": "no module matches 'embbed.*' Closest: 'embed'|no module matches 'embbed",
    "norm[0:2]": "'norm' is a LayerNorm: only rows of an nn.Embedding or nn.Linear are trained whole",
    "embed[0:2],embed[1:3]": "are the same numbers",
    "embed,embed[0:2]": "'embed' is trained in full anyway",
}


@pytest.mark.parametrize("rows", REFUSED)
def test_what_cannot_be_is_refused(rows: str) -> None:
    with pytest.raises(TargetError, match=REFUSED[rows]):
        lk.attach(Tower(), "lora", "up", train_modules=rows)


def test_every_problem_is_named() -> None:
    with pytest.raises(TargetError, match=r"(?s)embed\[10:14\].*norm.*is a LayerNorm"):
        lk.attach(Tower(), "lora", "up", train_modules="embed[10:14],norm[0:2]")


@pytest.mark.parametrize("target", ["embed", "head", "head[2:11]"])
def test_rows_that_have_an_update_too_are_refused(target: str) -> None:
    with pytest.raises(TargetError, match="are the same numbers"):
        lk.attach(Tower(), lk.LoRA(rank=2), target, train_modules=ROWS)


def test_rows_beside_an_update_of_others_are_trained() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2), "head[0:10]", train_modules="head[10:13]")
    assert "head[10:13].rows" in handle.parameters()


def test_tokens_have_no_low_rank_update() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"train_modules='embed\[0:2\]'"):
        lk.attach(Tower(), "lora", "embed[0:2]")


def test_a_table_that_is_too_small_is_named() -> None:
    _, handle, _ = attached("untied")
    small = Handle(Tower(vocabulary=11))
    with pytest.raises(ShapeError, match=r"'embed\[10:13\]': there are tokens 0 to 11"):
        small.add_state(handle.state())


def test_two_tables_do_not_become_one() -> None:
    _, handle, _ = attached("untied")
    with pytest.raises(ShapeError, match="are one table here, but two in the adapter"):
        Handle(Tower(tied=True)).add_state(handle.state())


def test_rows_of_another_width_are_refused() -> None:
    _, handle, _ = attached("untied")
    state = handle.state()
    site = state.rows["embed[10:13]"]
    wider = dataclasses.replace(site, tensors={"rows": torch.zeros(3, WIDTH + 1)})
    with pytest.raises(ShapeError, match=r"has rows \[3, 8\] here, but \[3, 9\] in the adapter"):
        Handle(Tower()).add_state(dataclasses.replace(state, rows={**state.rows, "embed[10:13]": wider}))
