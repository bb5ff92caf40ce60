"""DESIGN's contract: every method on every kind of layer, with alpha != rank and no square layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.adapters.targets import find_sites
from lorakit.errors import UnsupportedLayerError
from lorakit.layers import Site
from lorakit.methods import find_method

from .models import (
    ALPHA,
    CELLS,
    KINDS,
    METHODS,
    RANK,
    REFUSED,
    ROWS,
    OneLayer,
    fill_with_noise,
    method_named,
    one_layer,
    train_some_steps,
)

# Two fp32 sums over at most 36 terms in another order differ by some tens of ulps (1.2e-7 each) of the
# largest term; the terms here are of order 1 to 10.
SUM_ORDER = 2e-5

# torch says so of every projected LSTM on a CPU
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
cells = pytest.mark.parametrize(("method", "kind"), CELLS)


def attached(method: str, kind: str, **fields: object) -> tuple[OneLayer, Handle, Tensor]:
    model = one_layer(kind).eval()
    handle = lk.attach(model, method_named(method, **fields), KINDS[kind].target)
    return model, handle, KINDS[kind].inputs(ROWS)


def sites_of_adapter(model: OneLayer, handle: Handle) -> list[Site]:
    return [Site.at(model, path) for path in handle.updates()]


def trained(method: str, kind: str, **fields: object) -> tuple[OneLayer, Handle, Tensor]:
    model, handle, x = attached(method, kind, **fields)
    train_some_steps(model, handle, x)
    return model, handle, x


def test_the_cells_use_an_alpha_that_is_not_the_rank() -> None:
    assert ALPHA != RANK


@pytest.mark.parametrize("kind", KINDS)
def test_the_cells_use_layers_that_are_not_square(kind: str) -> None:
    assert all(site.d_out != site.d_in for site in find_sites(one_layer(kind), KINDS[kind].target))


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_a_layer_that_a_method_cannot_act_on_is_refused_by_name(method: str, kind: str) -> None:
    model = one_layer(kind)
    with pytest.raises(UnsupportedLayerError, match=rf"method '{method}'.*'layer"):
        lk.attach(model, method_named(method), KINDS[kind].target)
    assert lk.handle_of(model) is None


@cells
def test_attaching_leaves_the_output_unchanged_at_step_0(method: str, kind: str) -> None:
    model = one_layer(kind).eval()
    x = KINDS[kind].inputs(ROWS)
    with torch.no_grad():
        before = model(x)
        lk.attach(model, method_named(method), KINDS[kind].target)
        assert torch.equal(model(x), before)


@cells
def test_training_moves_the_output(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    with handle.disabled():
        before = model(x)
    assert (model(x) - before).abs().max() > 100 * SUM_ORDER


@cells
def test_merged_equals_unmerged(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    unmerged = model(x)
    handle.merge()
    torch.testing.assert_close(model(x), unmerged, rtol=0, atol=SUM_ORDER)


@cells
def test_the_dense_delta_is_what_merging_adds(method: str, kind: str) -> None:
    model, handle, _ = trained(method, kind)
    layer = model.layer
    expected = {site.ops.parameter: site.ops.weight(layer).clone() for site in sites_of_adapter(model, handle)}
    for site in sites_of_adapter(model, handle):
        expected[site.ops.parameter] += site.ops.as_weight(layer, handle.delta(site.path))
    handle.merge()
    assert all(torch.equal(layer.get_parameter(name), weight) for name, weight in expected.items())


@cells
def test_the_weight_returns_from_its_matrix(method: str, kind: str) -> None:
    model, handle, _ = attached(method, kind)
    for site in sites_of_adapter(model, handle):
        matrix = torch.randn(*site.stack, site.d_out, site.d_in)
        assert torch.equal(site.ops.as_matrix(model.layer, site.ops.as_weight(model.layer, matrix)), matrix)


@cells
def test_training_leaves_every_bit_of_the_base(method: str, kind: str) -> None:
    model, handle, x = attached(method, kind)
    before = handle.digest()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lorakit" not in name}
    train_some_steps(model, handle, x)
    assert handle.digest() == before
    handle.detach()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


@cells
def test_a_saved_adapter_comes_back_bit_for_bit(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    with torch.no_grad():
        state, out = handle.state(), model(x)
    other = copy.deepcopy(handle.detach())
    again = Handle(other)
    again.add_state(state)
    found = again.state()
    assert found.method == state.method
    assert found.sites.keys() == state.sites.keys()
    for path, site in state.sites.items():
        for name, tensor in site.tensors.items():
            assert torch.equal(found.sites[path].tensors[name], tensor)
    with torch.no_grad():
        assert torch.equal(other(x), out)


@cells
def test_a_row_in_a_mixed_batch_equals_the_row_alone(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    handle.add("second", method_named(method), KINDS[kind].target)
    fill_with_noise(handle, "second")
    route = ["default", None, "second", "default"]
    with handle.routed(route):
        mixed = model(x)
    for row, name in enumerate(route):
        with handle.using(name):
            alone = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=SUM_ORDER)


@cells
def test_rows_of_the_base_in_a_mixed_batch_have_the_bases_bits(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    with handle.disabled():
        base = model(x)
    with handle.routed([None, "default", None, None]):
        mixed = model(x)
    assert torch.equal(mixed[[0, 2, 3]], base[[0, 2, 3]])
    assert not torch.equal(mixed[1], base[1])


@cells
def test_only_its_own_parameters_get_gradients(method: str, kind: str) -> None:
    model, handle, x = attached(method, kind)
    handle.add("idle", method_named(method), KINDS[kind].target)
    fill_with_noise(handle, "default")
    handle.use("default")
    model.train()(x).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    own = {id(parameter) for parameter in handle.parameters("default").values()}
    assert with_gradient == {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.parameters("default").values())


graph_cells = pytest.mark.parametrize(("method", "kind"), [cell for cell in CELLS if KINDS[cell[1]].one_graph])


@graph_cells
def test_the_whole_is_one_graph(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=SUM_ORDER)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters().values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own
@graph_cells
def test_inductor_computes_the_same(method: str, kind: str) -> None:
    model, _, x = trained(method, kind)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=SUM_ORDER)


@cells
def test_unmerging_restores_every_bit_and_the_same_tensors(method: str, kind: str) -> None:
    model, handle, x = trained(method, kind)
    before, out = handle.digest(), model(x)
    objects = {name: p for name, p in model.named_parameters() if "lorakit" not in name.split(".")}
    handle.merge()
    handle.unmerge()
    assert handle.digest() == before
    assert torch.equal(model(x), out)
    assert all(p is objects[name] for name, p in model.named_parameters() if "lorakit" not in name.split("."))


@cells
def test_detaching_gives_the_untouched_base_back(method: str, kind: str) -> None:
    model = one_layer(kind).eval()
    x = KINDS[kind].inputs(ROWS)
    before, kind_before = model(x), type(model.layer)
    handle = lk.attach(model, method_named(method), KINDS[kind].target)
    train_some_steps(model, handle, x)
    handle.detach()
    assert torch.equal(model(x), before)
    assert type(model.layer) is kind_before


@cells
def test_disabled_equals_the_base_bit_for_bit(method: str, kind: str) -> None:
    model = one_layer(kind).eval()
    x = KINDS[kind].inputs(ROWS)
    before = model(x)
    handle = lk.attach(model, method_named(method), KINDS[kind].target)
    train_some_steps(model, handle, x)
    with handle.disabled():
        assert torch.equal(model(x), before)


VARIANTS: list[dict[str, object]] = [{"scaling": "rslora"}, {"init": "gaussian"}, {"bias": "lora_only"}]


@pytest.mark.parametrize(
    ("method", "fields"),
    [(name, fields) for name in METHODS for fields in VARIANTS if fields.keys() <= find_method(name).summary().keys()],
)
@pytest.mark.parametrize("kind", ["linear", "transposed", "conv2d"])
def test_variants_merge_and_unmerge_like_the_plain_ones(method: str, kind: str, fields: dict[str, object]) -> None:
    model, handle, x = trained(method, kind, **fields)
    digest, out = handle.digest(), model(x)
    handle.merge()
    torch.testing.assert_close(model(x), out, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    assert handle.digest() == digest


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_start(method: str) -> None:
    def start(seed: int) -> dict[str, Tensor]:
        model = OneLayer(nn.Linear(6, 10))
        with torch.no_grad():
            model.layer.weight.fill_(1.0)
        handle = lk.attach(model, method_named(method), "layer", seed=seed)
        state = handle.state()
        return {**{f"{p}.{n}": t for p, site in state.sites.items() for n, t in site.tensors.items()}, **state.shared}

    first, second, other = start(1), start(1), start(2)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
