"""Updates of parts of a projection: exact, and no bit of the other rows moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import AdapterState, Handle
from lorakit.adapters.targets import find_sites
from lorakit.errors import ShapeError
from lorakit.layers import BranchOps, Site, Terms, add_update
from lorakit.layers.ops import Runs, find_ops
from lorakit.layers.parts import part_of

from .models import KINDS, OneLayer, fill_with_noise, method_named, one_layer

# Two fp32 sums of at most 64 terms of order 1 in another order, through the layers of a tiny model.
SUM_ORDER = 2e-5
# Rounding in fp32 takes a straight line at most 7e-6 off, relative to its end; an activation bends by 2e-2 here.
STRAIGHT = 1e-4
TOKENS = torch.tensor([[3, 7, 1, 9, 4, 11], [8, 2, 14, 5, 21, 6]])


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=24, n_layer=2, n_head=4))


def bloom(heads: int = 4) -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=30, hidden_size=24, n_layer=2, n_head=heads))


def falcon(**fields: object) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    settings = {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, **fields}
    return FalconForCausalLM(FalconConfig(**settings))


def phi3(heads: int = 4, groups: int = 2) -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Phi3ForCausalLM(config)


def codegen() -> nn.Module:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    sizes = {"vocab_size": 30, "n_positions": 16, "n_ctx": 16, "n_embd": 32, "n_layer": 2, "n_head": 8}
    return CodeGenForCausalLM(CodeGenConfig(**sizes, rotary_dim=4))


# A model, its fused projection, a part that stays, and the other parts.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str, tuple[str, ...]]] = {
    "gpt2": (gpt2, "c_attn", "k", ("q", "v")),
    "bloom": (bloom, "query_key_value", "k", ("q", "v")),
    "falcon grouped": (
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
        "query_key_value",
        "k",
        ("q", "v"),
    ),
    "falcon multi-query": (lambda: falcon(multi_query=True), "query_key_value", "k", ("q", "v")),
    "falcon": (lambda: falcon(multi_query=False), "query_key_value", "q", ("k", "v")),
    "phi3": (phi3, "qkv_proj", "k", ("q", "v")),
    "phi3 mlp": (phi3, "gate_up_proj", "gate", ("up",)),
    "codegen": (codegen, "qkv_proj", "k", ("q", "v")),
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    return MODELS[name][0]().eval().requires_grad_(False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(TOKENS).logits
    return out


def adapted(name: str, method: str = "lora", **fields: object) -> tuple[nn.Module, Handle]:
    """Return a model with noise in an adapter of all parts but the one that stays."""
    _, projection, _, parts = MODELS[name]
    model = model_of(name)
    handle = lk.attach(model, method_named(method, **fields), f"{projection}[{','.join(parts)}]")
    fill_with_noise(handle)
    return model, handle


def outputs_of(model: nn.Module, projection: str) -> Tensor:
    """Return what the first of these projections puts out."""
    kept: list[Tensor] = []
    layer = next(module for path, module in model.named_modules() if path.endswith(projection))
    hook = layer.register_forward_hook(lambda module, args, out: kept.append(out))
    logits(model)
    hook.remove()
    return kept[0]


def index_of(model: nn.Module, projection: str, part: str) -> Tensor:
    """Return the rows of a part of the first of these projections."""
    site = find_sites(model, f"{projection}[{part}]")[0]
    assert site.runs is not None
    return torch.cat([torch.arange(start, stop) for start, stop in site.runs])


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


@models
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_part_that_is_no_target_keeps_every_bit(name: str, method: str) -> None:
    _, projection, stays, _ = MODELS[name]
    model, handle = adapted(name, method)
    rows = index_of(model, projection, stays)
    out = outputs_of(model, projection)
    with handle.disabled():
        base = outputs_of(model, projection)
    assert torch.equal(bits(out[..., rows]), bits(base[..., rows]))


@models
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_row_of_the_targeted_parts_moves(name: str, method: str) -> None:
    _, projection, _, parts = MODELS[name]
    model, handle = adapted(name, method)
    rows = torch.cat([index_of(model, projection, part) for part in parts])
    out = outputs_of(model, projection)
    with handle.disabled():
        moved = (out != outputs_of(model, projection)).flatten(0, -2).any(dim=0)
    assert moved[rows].all()


@models
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_equals_unmerged(name: str, method: str) -> None:
    model, handle = adapted(name, method)
    unmerged = logits(model)
    handle.merge()
    torch.testing.assert_close(logits(model), unmerged, rtol=0, atol=SUM_ORDER)


@models
def test_merging_writes_no_bit_of_the_part_that_is_no_target(name: str) -> None:
    _, projection, stays, _ = MODELS[name]
    model, handle = adapted(name)
    whole = find_sites(model, projection)[0]
    rows, before = index_of(model, projection, stays), whole.matrix().clone()
    handle.merge()
    assert torch.equal(bits(whole.matrix()[rows]), bits(before[rows]))


@models
def test_all_parts_of_full_rank_are_three_adapters_of_one_part_each(name: str) -> None:
    _, projection, stays, others = MODELS[name]
    parts = (stays, *others)
    model = model_of(name)
    rank = min(min(site.d_out, site.d_in) for part in parts for site in find_sites(model, f"{projection}[{part}]"))
    together = lk.attach(model, lk.LoRA(rank=rank, alpha=5), f"{projection}[{','.join(parts)}]")
    fill_with_noise(together)
    expected, own = logits(model), together.parameters()
    for part in parts:
        lk.attach(model, lk.LoRA(rank=rank, alpha=5), f"{projection}[{part}]", name=f"only {part}")
        for path, parameter in together.parameters(f"only {part}").items():
            parameter.data.copy_(own[path])
    together.use([f"only {part}" for part in parts])
    assert torch.equal(logits(model), expected)


@models
def test_each_part_adds_its_product_to_its_rows_of_the_weight(name: str) -> None:
    _, projection, _, parts = MODELS[name]
    model, handle = adapted(name, rank=4, alpha=6.0)
    by_hand = model_of(name)
    by_hand.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "lorakit" not in key})
    for whole in find_sites(by_hand, projection):
        weight = whole.matrix().clone()
        for part in parts:
            site = Site.at(by_hand, f"{whole.path}[{part}]")
            tensors = handle.state().sites[site.path].tensors
            weight[index_of(by_hand, projection, part)] += 6.0 / 4 * tensors["B"] @ tensors["A"]
        whole.ops.weight(whole.layer).copy_(whole.ops.as_weight(whole.layer, weight))
    torch.testing.assert_close(logits(by_hand), logits(model), rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize(
    ("saved", "other", "entry", "rows"),
    [
        (
            lambda: bloom(heads=4),
            lambda: bloom(heads=2),
            "query_key_value[v]",
            "rows 12:18, 30:36, 48:54 and 1 more, here 24:36, 60:72",
        ),
        (lambda: phi3(4, 2), lambda: phi3(6, 1), "qkv_proj[v]", "rows 36:48, here 42:48"),
    ],
    ids=["as many rows, others", "more rows"],
)
def test_an_adapter_of_another_split_is_refused_with_both_rows(
    saved: Callable[[], nn.Module], other: Callable[[], nn.Module], entry: str, rows: str
) -> None:
    state: AdapterState = lk.attach(saved(), lk.LoRA(rank=2), entry).state()
    model = other()
    with pytest.raises(ShapeError, match=f"belongs to another split of '.*': its part 'v' is {rows}"):
        Handle(model).add_state(state)


def test_a_saved_part_comes_back_to_the_same_rows() -> None:
    model, handle = adapted("falcon grouped")
    expected, state = logits(model), handle.state()
    again = model_of("falcon grouped")
    again.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "lorakit" not in key})
    Handle(again).add_state(state)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("name", ["bloom", "falcon grouped", "phi3"])
def test_a_projection_of_parts_is_one_graph(name: str) -> None:
    model, handle = adapted(name)
    layer, x = find_sites(model, MODELS[name][1])[0].layer, torch.randn(2, 5, 24)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=SUM_ORDER)
    compiled(x).sum().backward()
    first = [p for path, p in handle.parameters().items() if ".0." in path]
    assert all(parameter.grad is not None for parameter in first)


# Rows of a dimension of 24: how a fused projection may hold a part.
RUNS: dict[str, Runs] = {
    "one run": ((3, 11),),
    "by head": ((2, 4), (8, 10), (14, 16), (20, 22)),
    "from the start": ((0, 5), (12, 17)),
    "to the end": ((5, 12), (17, 24)),
    "single rows": tuple((i, i + 1) for i in range(1, 24, 2)),
    "of other lengths": ((0, 2), (6, 9), (12, 14)),
    "at other distances": ((0, 2), (6, 8), (13, 15)),
    "over a half only": ((0, 2), (6, 8)),
    "beyond a period": ((5, 9), (17, 21)),
}
runs_of_all_kinds = pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())


def listed(runs: Runs) -> list[int]:
    return [row for start, stop in runs for row in range(start, stop)]


def part(runs: Runs) -> tuple[BranchOps, nn.Module]:
    layer = nn.Linear(5, 24)
    ops = find_ops(layer)
    assert ops is not None
    own = part_of(ops, runs)
    assert isinstance(own, BranchOps)
    return own, layer


@runs_of_all_kinds
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 0, 24), (2, 3, 24)])
def test_narrowing_takes_the_rows_in_order(runs: Runs, shape: tuple[int, ...]) -> None:
    ops, layer = part(runs)
    out = torch.randn(shape)
    assert torch.equal(ops.narrow(layer, out), out[..., listed(runs)])


@runs_of_all_kinds
def test_widening_puts_the_rows_back_and_keeps_all_others(runs: Runs) -> None:
    ops, layer = part(runs)
    out, rows = torch.randn(2, 3, 24), torch.randn(2, 3, len(listed(runs)))
    expected = out.clone()
    expected[..., listed(runs)] = rows
    assert torch.equal(ops.widen(layer, out, rows), expected)


@runs_of_all_kinds
def test_widening_leaves_its_input_alone(runs: Runs) -> None:
    ops, layer = part(runs)
    out = torch.randn(2, 3, 24)
    kept = out.clone()
    ops.widen(layer, out, torch.randn(2, 3, len(listed(runs))))
    assert torch.equal(out, kept)


@runs_of_all_kinds
def test_gradients_of_the_rows_and_of_all_others_stay_apart(runs: Runs) -> None:
    ops, layer = part(runs)
    out, rows = torch.randn(3, 24, requires_grad=True), torch.randn(3, len(listed(runs)), requires_grad=True)
    slopes = torch.randn(3, 24)
    (ops.widen(layer, out, rows) * slopes).sum().backward()
    others = [row for row in range(24) if row not in listed(runs)]
    assert torch.equal(rows.grad, slopes[:, listed(runs)])
    assert torch.equal(out.grad[:, others], slopes[:, others])
    assert not out.grad[:, listed(runs)].any()


@runs_of_all_kinds
def test_a_parts_matrix_goes_to_its_rows_of_the_weight(runs: Runs) -> None:
    ops, layer = part(runs)
    matrix = torch.randn(len(listed(runs)), 5)
    weight = ops.as_weight(layer, matrix)
    assert torch.equal(weight[listed(runs)], matrix)
    assert weight.count_nonzero() == matrix.numel()


# Layers whose channels are not the last dimension of their output, or that do not take numbers.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 9, 3), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 9, 3), lambda: torch.randn(2, 4, 6, 5)),
    "conv2d groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), lambda: torch.randn(2, 6, 6, 5)),
    "conv2d of one picture": (lambda: nn.Conv2d(4, 9, 1), lambda: torch.randn(4, 6, 5)),
    "conv transpose": (lambda: nn.ConvTranspose2d(4, 9, 3, stride=2), lambda: torch.randn(2, 4, 3, 4)),
    "conv transpose groups": (lambda: nn.ConvTranspose1d(4, 10, 3, groups=2), lambda: torch.randn(2, 4, 5)),
}
SOME = ((1, 4), (6, 8))
layers = pytest.mark.parametrize("name", LAYERS)


def rows_of(name: str, **more: Tensor) -> tuple[nn.Module, BranchOps, Tensor, Terms]:
    """Return a layer, the ops of some of its rows, an input, and an update of those rows."""
    make, inputs = LAYERS[name]
    layer = make().requires_grad_(False)
    inner = find_ops(layer)
    assert inner is not None
    ops = part_of(inner, SOME)
    assert isinstance(ops, BranchOps)
    d_out, d_in = ops.dims(layer)
    return layer, ops, inputs(), Terms(torch.randn(3, d_in), torch.randn(d_out, 3), 0.7, **more)


@layers
@pytest.mark.parametrize(
    "more",
    [{}, {"row_scale": torch.tensor([0.5, 1.5, -1.0, 2.0, 0.8]), "rank_gain": torch.tensor([0.3, 2.0, -1.0])}],
    ids=["product", "gains"],
)
def test_rows_of_any_layer_compute_what_their_weight_does(name: str, more: dict[str, Tensor]) -> None:
    layer, ops, x, terms = rows_of(name, **more)
    base = layer(x)
    out = add_update(ops, layer, x, base, base, terms)
    weight = ops.weight(layer)
    weight += ops.as_weight(layer, terms.delta(ops.as_matrix(layer, weight)))
    torch.testing.assert_close(out, layer(x), rtol=0, atol=SUM_ORDER)


@layers
def test_rows_of_any_layer_keep_every_bit_of_the_others(name: str) -> None:
    layer, ops, x, terms = rows_of(name)
    base = layer(x)
    same = bits(add_update(ops, layer, x, base, base, terms)) == bits(base)
    channels = {"conv2d of one picture": 0}.get(name, 1)
    changed = [not row.all() for row in same.unbind(channels)]
    assert [i for i, moved in enumerate(changed) if moved] == listed(SOME)


def test_a_part_starts_with_the_factors_of_the_whole() -> None:
    starts = []
    for target in ("layer", "layer[2:8]"):
        handle = lk.attach(OneLayer(nn.Linear(7, 9)), lk.LoRA(rank=3), target, seed=5)
        starts.append(next(p for path, p in handle.parameters().items() if path.endswith(".A")))
    assert torch.equal(*starts)


@pytest.mark.parametrize("kind", ["experts", "experts with biases"])
@pytest.mark.parametrize("part", ["gate", "up"])
def test_a_part_of_stacked_experts_has_a_pair_for_each(kind: str, part: str) -> None:
    model = one_layer(kind).eval()
    x = KINDS[kind].inputs(4)
    handle = lk.attach(model, lk.LoRA(rank=3, alpha=5), f"layer.gate_up_proj[{part}]")
    fill_with_noise(handle)
    assert {tuple(parameter.shape[:1]) for parameter in handle.parameters().values()} == {(4,)}
    unmerged = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), unmerged, rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("kind", ["experts", "experts with biases"])
def test_rows_of_stacked_experts_are_what_the_class_uses_them_as(kind: str) -> None:
    """A row of ``up`` moves the output in a straight line, one of ``gate`` bends it."""
    model = one_layer(kind).eval()
    whole = Site.at(model, "layer.gate_up_proj")
    x, weight = KINDS[kind].inputs(64), whole.ops.weight(model.layer)
    base, plain, found = model(x), weight.clone(), []
    for row in range(whole.d_out):
        step = torch.zeros(*whole.stack, whole.d_out, whole.d_in)
        step[:, row] = 0.1
        once, twice = (model_with(model, weight, plain + n * whole.ops.as_weight(model.layer, step), x) for n in (1, 2))
        bend = (twice - 2 * once + base).abs().max() / (twice - base).abs().max()
        found.append("up" if bend < STRAIGHT else "gate")
    sites = {name: Site.at(model, f"layer.gate_up_proj[{name}]").runs for name in ("gate", "up")}
    assert {name: listed(runs) for name, runs in sites.items() if runs is not None} == {
        name: [row for row, role in enumerate(found) if role == name] for name in sites
    }


def model_with(model: nn.Module, weight: Tensor, values: Tensor, x: Tensor) -> Tensor:
    weight.copy_(values)
    out: Tensor = model(x)
    return out
