"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells with every option of torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.adapters.targets import find_sites
from lorakit.errors import RoutingError
from lorakit.layers import Site

from .models import METHODS, WHOLE, dense_twin, fill_with_noise, method_named, pickled, train_some_steps

# torch says so of every projected LSTM on a CPU
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
SUM_ORDER = 2e-5  # fp32 sums over some ten terms of order 1, in another order
ROWS, LENGTH, WIDTH, HIDDEN = 4, 6, 5, 4

LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(WIDTH, HIDDEN, batch_first=True),
    "lstm, sequence first": lambda: nn.LSTM(WIDTH, HIDDEN),
    "two layers, both ways": lambda: nn.LSTM(WIDTH, HIDDEN, 2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(WIDTH, HIDDEN, 2, proj_size=3, bidirectional=True, batch_first=True),
    "without biases": lambda: nn.LSTM(WIDTH, HIDDEN, bias=False, batch_first=True),
    "gru": lambda: nn.GRU(WIDTH, HIDDEN, 2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(WIDTH, HIDDEN, batch_first=True),
    "rnn of relu": lambda: nn.RNN(WIDTH, HIDDEN, 2, nonlinearity="relu"),
}
layers = pytest.mark.parametrize("name", LAYERS)


class Runs(nn.Module):
    """A recurrent layer; batch first whatever the layer wants, all its outputs in one list."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, x: Any, hx: Any = None) -> list[Tensor]:
        turn = isinstance(x, Tensor) and x.dim() == 3 and not self.rnn.batch_first
        out, states = self.rnn(x.transpose(0, 1) if turn else x, hx)
        if isinstance(out, PackedSequence):
            out = out.data
        batched = isinstance(x, Tensor) and x.dim() == 3
        states = [states] if isinstance(states, Tensor) else [*states]
        return [out.transpose(0, 1) if turn else out, *(s.transpose(0, 1) if batched else s for s in states)]


def made(name: str, method: str = "lora", targets: str = "rnn") -> tuple[Runs, Handle]:
    model = Runs(LAYERS[name]()).eval().requires_grad_(False)  # torch has another kernel for trained weights
    handle = lk.attach(model, method_named(method, rank=2), targets)
    fill_with_noise(handle)
    return model, handle


def states_for(model: Runs, rows: int | None = ROWS) -> Any:
    layer = model.rnn
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if rows is None else (rows,)
    h = torch.randn(count, *batch, getattr(layer, "proj_size", 0) or HIDDEN)
    return (h, torch.randn(count, *batch, HIDDEN)) if isinstance(layer, nn.LSTM) else h


def by_the_dense_weights(model: Runs, handle: Handle, *args: Any) -> list[Tensor]:
    """Return what a layer of torch's computes that holds W + delta."""
    return dense_twin(model, handle)(*args)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SUM_ORDER)


@layers
@pytest.mark.parametrize("method", METHODS)
def test_it_equals_the_dense_truth_merged_and_by_row(method: str, name: str) -> None:
    model, handle = made(name, method)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    for hx in (None, states_for(model)):
        truth = by_the_dense_weights(model, handle, x, hx)
        with torch.no_grad():
            with handle.disabled():
                base = model(x, hx)
            assert (truth[0] - base[0]).abs().max() > 100 * SUM_ORDER
            with handle.routed([None, "default", "default", None]):
                mixed = model(x, hx)
        assert_close(model(x, hx), truth)
        for found, own, expected in zip(mixed, base, truth, strict=True):
            assert torch.equal(found[[0, 3]], own[[0, 3]])
            torch.testing.assert_close(found[[1, 2]], expected[[1, 2]], rtol=0, atol=SUM_ORDER)
        handle.merge()
        assert_close(model(x, hx), truth)
        handle.unmerge()
        assert_close(model(x, hx), truth)


@pytest.mark.parametrize("name", ["two layers, both ways", "gru", "rnn of relu"])
def test_an_input_without_a_batch_runs_and_is_not_routed(name: str) -> None:
    model, handle = made(name)
    x, hx = torch.randn(LENGTH, WIDTH), states_for(model, None)
    assert_close(model(x, hx), by_the_dense_weights(model, handle, x, hx))
    with pytest.raises(RoutingError, match="no batch dimension"), handle.routed(["default"]):
        model(x)


@pytest.mark.parametrize("name", ["two layers, both ways", "projected", "gru"])
def test_a_packed_sequence_runs_and_is_refused_by_name_where_rows_are_routed(name: str) -> None:
    model, handle = made(name)
    packed = pack_padded_sequence(torch.randn(ROWS, LENGTH, WIDTH), torch.tensor([6, 2, 4, 1]), True, False)
    truth = by_the_dense_weights(model, handle, packed)
    assert_close(model(packed), truth)
    kind = "LSTM" if isinstance(model.rnn, nn.LSTM) else "GRU"
    match = f"a packed sequence meets a {kind}.*Pass a padded tensor"
    with pytest.raises(RoutingError, match=match), handle.routed(["default", *[None] * 3]):
        model(packed)
    handle.merge()
    assert_close(model(packed), truth)


def test_arguments_may_come_by_name_in_any_order() -> None:
    model, handle = made("lstm")
    x, hx = torch.randn(ROWS, LENGTH, WIDTH), states_for(model)
    expected = model(x, hx)[0]
    assert torch.equal(model.rnn(hx=hx, input=x)[0], expected)
    with handle.routed([None, "default", None, None]):
        torch.testing.assert_close(model.rnn(hx=hx, input=x)[0][1], expected[1], rtol=0, atol=SUM_ORDER)


def test_its_own_dropout_between_layers_acts_in_training() -> None:
    model = Runs(nn.LSTM(WIDTH, HIDDEN, 2, dropout=0.5, batch_first=True)).requires_grad_(False)
    handle = lk.attach(model, lk.LoRA(rank=2), "rnn")
    fill_with_noise(handle)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    model.train()
    torch.manual_seed(5)
    truth = by_the_dense_weights(model, handle, x)
    torch.manual_seed(5)
    assert_close(model(x), truth)
    assert not torch.allclose(model.eval()(x)[0], truth[0])


@layers
def test_every_weight_has_an_update_that_trains(name: str) -> None:
    model, handle = made(name)
    weights = [n for n, _ in model.rnn.named_parameters() if n.startswith("weight")]
    assert list(handle.updates()) == [f"rnn.{n}" for n in weights]
    sum(out.square().sum() for out in model.train()(torch.randn(ROWS, LENGTH, WIDTH))).backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters().values())
    assert all(p.grad is None for n, p in model.named_parameters() if "lorakit" not in n)


# The list of weights that the layer keeps -----------------------------------------------------------


def flat(model: Runs) -> list[Tensor]:
    return [model.rnn.get_parameter(name) for name in model.rnn._flat_weights_names]


def is_followed(model: Runs) -> bool:
    return all(own is listed for own, listed in zip(flat(model), model.rnn._flat_weights, strict=True))


@pytest.mark.parametrize("keep", ["memory", "none"])
@torch.no_grad()
def test_its_list_of_weights_follows_a_merge(keep: str) -> None:
    model, handle = made("projected")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    expected = model(x)
    assert is_followed(model)
    handle.merge(keep=keep)
    assert is_followed(model)
    assert_close(model(x), expected)
    if keep == "memory":
        handle.unmerge()
        assert is_followed(model)
    else:
        handle.bake()
        assert is_followed(model)
        assert type(model.rnn) is nn.LSTM
    assert_close(model(x), expected)


@torch.no_grad()
def test_the_first_forward_after_a_merged_one_has_the_update() -> None:
    model, handle = made("lstm")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    expected = model(x)
    for _ in range(2):
        handle.merge()
        model(x)  # here torch notes that the weights are others
        handle.unmerge()
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))


@torch.no_grad()
def test_a_call_that_fails_leaves_its_own_weights() -> None:
    model, handle = made("lstm")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        model(torch.randn(ROWS, LENGTH, WIDTH + 1))
    assert is_followed(model)
    with handle.disabled():
        assert not torch.equal(model(x)[0], expected[0])
    assert torch.equal(model(x)[0], expected[0])


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@pytest.mark.parametrize("merged", [True, False])
@torch.no_grad()
def test_a_copy_has_weights_of_its_own(way: Callable[[nn.Module], nn.Module], merged: bool) -> None:
    model, handle = made("two layers, both ways")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    expected = model(x)
    if merged:
        handle.merge()
    clone = way(model)
    other = lk.handle_of(clone)
    assert other is not None
    assert isinstance(clone, Runs)
    assert is_followed(clone)
    assert_close(clone(x), expected)
    if merged:
        other.unmerge()
    fill_with_noise(other)
    assert not torch.allclose(clone(x)[0], expected[0])
    other.detach()
    assert type(clone.rnn) is nn.LSTM
    assert_close(model(x), expected)


@torch.no_grad()
def test_it_moves_to_another_dtype_and_back() -> None:
    model, handle = made("lstm")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    expected = model(x)
    model.double()
    assert is_followed(model)
    assert_close([out.float() for out in model(x.double())], expected)
    model.float()
    model.rnn.flatten_parameters()
    assert is_followed(model)
    assert_close(model(x), expected)
    handle.merge()
    model.double()
    assert_close([out.float() for out in model(x.double())], expected)


def test_the_keys_of_the_base_stay_and_a_state_is_loaded_below_the_adapter() -> None:
    keys = list(Runs(LAYERS["projected"]()).state_dict())
    model, handle = made("projected")
    assert [key for key in model.state_dict() if "lorakit" not in key] == keys
    other = Runs(LAYERS["projected"]()).requires_grad_(False)
    model.load_state_dict(other.state_dict(), strict=False)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    with torch.no_grad(), handle.disabled():
        assert torch.equal(model(x)[0], other(x)[0])


# A whole model --------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Tokens to tags: an embedding, an LSTM both ways, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


WEIGHTS = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]


def test_the_word_all_linear_means_its_recurrent_weights_too() -> None:
    found = [site.path for site in find_sites(Tagger(), "all-linear")]
    assert found == [*(f"lstm.{name}" for name in WEIGHTS), "head"]
    handle = lk.attach(Tagger(), lk.LoRA(rank=2))
    reached = 4 * HIDDEN * (WIDTH + HIDDEN) * 2 + 3 * 2 * HIDDEN
    assert (handle.coverage().reached, handle.coverage().total) == (reached, reached + 11 * WIDTH)
    assert handle.coverage().unreached == (("embed", 11 * WIDTH),)
    assert handle.counts().updates == 2 * (2 * (16 + WIDTH) + 2 * (16 + HIDDEN) + 3 + 2 * HIDDEN)


@pytest.mark.parametrize("method", WHOLE)
def test_a_tagger_is_trained_verified_merged_saved_and_routed(method: str) -> None:
    model, tokens = Tagger().eval(), torch.randint(0, 11, (ROWS, LENGTH))
    handle = lk.attach(model, method_named(method, rank=2, bias="all"), "all-linear,embed")
    assert handle.verify(tokens).num_sites == 6
    before = handle.digest()
    train_some_steps(model, handle, tokens)
    assert handle.digest() == before
    with torch.no_grad():
        expected, state = model(tokens), handle.state()
        assert {f"lstm.{name}" for name in WEIGHTS} <= set(state.biases)
        with handle.disabled():
            base = model(tokens)
        with handle.routed([None, "default", "default", None]):
            mixed = model(tokens)
        assert torch.equal(mixed[[0, 3]], base[[0, 3]])
        torch.testing.assert_close(mixed[[1, 2]], expected[[1, 2]], rtol=0, atol=SUM_ORDER)
        handle.merge()
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=SUM_ORDER)
        handle.unmerge()
        handle.detach()
        # torch multiplies an input that does not lie in order otherwise where the other factor is trained
        Handle(model).add_state(state, trainable=True)
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=SUM_ORDER)


def test_a_recurrent_layer_is_trained_in_full_beside_an_update_mixed_and_routed() -> None:
    model, tokens = Tagger().eval(), torch.randint(0, 11, (ROWS, LENGTH))
    handle = lk.attach(model, lk.LoRA(rank=2), "lstm", name="update")
    fill_with_noise(handle)
    handle.add("whole", lk.LoRA(rank=2), "head", train_modules="lstm")
    fill_with_noise(handle, "whole")
    with torch.no_grad():
        outs = {}
        for name in ("whole", "update", None):
            with handle.using(name):
                outs[name] = model(tokens)
        with handle.routed(["whole", None, "update", "whole"]):
            mixed = model(tokens)
        for row, name in enumerate(["whole", None, "update", "whole"]):
            torch.testing.assert_close(mixed[row], outs[name][row], rtol=0, atol=SUM_ORDER)
        for which in ("whole", {"whole": 0.4, "update": 0.7}):
            handle.use(which)
            expected = model(tokens)
            handle.merge()
            torch.testing.assert_close(model(tokens), expected, rtol=0, atol=SUM_ORDER)
            handle.unmerge()
    handle.use("whole")
    model.train()(tokens).sum().backward()
    assert all(p.grad is not None for key, p in handle.parameters("whole").items() if key.startswith("lstm."))
    weight = Site.at(model, "lstm.weight_hh_l0").matrix()
    own = handle.parameters("whole")["lstm.weight_hh_l0"].detach()
    assert torch.equal(handle.delta("lstm.weight_hh_l0", "whole"), own - weight)


@pytest.mark.parametrize("packed", [True, False])
def test_a_recurrent_layer_in_fp32_is_trained_on_a_base_of_half_precision(packed: bool) -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(WIDTH, HIDDEN, batch_first=True), "fc": nn.Linear(2, 2)}).bfloat16()
    handle = lk.attach(model, lk.LoRA(rank=2), "fc", train_modules="lstm")
    x: Any = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.bfloat16)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([6, 2, 4, 1]), True, False)
    out = model["lstm"](x)[0]
    out = out.data if packed else out
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    own = {key: p for key, p in handle.parameters().items() if key.startswith("lstm.")}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own.values())
