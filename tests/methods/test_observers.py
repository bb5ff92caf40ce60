"""Looking at the base on examples: gradients layer by layer, inputs token by token, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lorakit as lk
from lorakit.errors import DataError, UnsupportedLayerError
from lorakit.inits.calibration import num_rows
from lorakit.inits.gradients import gradient_directions
from lorakit.inits.inputs import Components, components_of_inputs, look_at_inputs, shared_inputs
from lorakit.layers import Site
from lorakit.methods.lora import LoRA

# fp32 sums of the same products in another order, through a decomposition of at most 120 x 100 numbers.
DECOMPOSED = 1e-4
# What two power iterations leave of a spectrum that falls like 1/i.
SKETCHED = 1e-2


class Net(nn.Module):
    """Two layers that read one input, one that reads theirs, and dropout, which must not act."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(30, 120), nn.Linear(30, 120)
        self.down = nn.Linear(120, 100)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, goal: Tensor | None = None) -> Tensor:
        return self.down(self.dropout(torch.tanh(self.gate(x)) * self.up(x)))


NAMES = ("gate", "up", "down")


def loss(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["goal"]).square().mean()


def batches(count: int, rows: int = 16) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(rows, 30), "goal": torch.randn(rows, 100)} for _ in range(count)]


def sites_of(model: nn.Module, paths: Sequence[str] = NAMES) -> list[Site]:
    return [Site.at(model, path) for path in paths]


def mean_gradients(model: nn.Module, given: Sequence[Any], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the gradients of the weighted mean loss, as autograd gives them all at once."""
    model.eval()
    total = sum(w * loss(model, batch) for w, batch in zip(weights, given, strict=True)) / sum(weights)
    found = torch.autograd.grad(total, [model.get_parameter(f"{name}.weight") for name in NAMES])
    return dict(zip(NAMES, found, strict=True))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def found_at(model: nn.Module, calibration: lk.Calibration, count: int = 4) -> dict[str, Any]:
    return gradient_directions(model, sites_of(model), dict.fromkeys(NAMES, count), calibration, seeded())


def captured(G: Tensor, directions: Any) -> float:
    """Return how much of the energy that its best approximation has a gradient has along these directions."""
    best = torch.linalg.svdvals(G)[: directions.left.shape[1]].square().sum()
    return float((directions.left.T @ G @ directions.right).square().sum() / best)


def test_one_batch_gives_the_singular_values_of_its_gradient() -> None:
    model, given = Net(), batches(1)
    expected = mean_gradients(model, given, [1.0])
    found = found_at(model, lk.Calibration(given, loss))
    for name, G in expected.items():
        torch.testing.assert_close(found[name].values, torch.linalg.svdvals(G)[:4], rtol=DECOMPOSED, atol=0)


def test_several_batches_give_the_singular_values_of_the_weighted_mean_gradient() -> None:
    model, given, weights = Net(), batches(3), [1.0, 5.0, 2.5]
    weight_of = {id(batch): weight for batch, weight in zip(given, weights, strict=True)}
    expected = mean_gradients(model, given, weights)
    found = found_at(model, lk.Calibration(given, loss, weight=lambda batch: weight_of[id(batch)]))
    for name, G in expected.items():
        torch.testing.assert_close(found[name].values, torch.linalg.svdvals(G)[:4], rtol=SKETCHED, atol=0)


def test_several_batches_give_the_directions_of_the_mean_gradient() -> None:
    model, given = Net(), batches(3)
    expected = mean_gradients(model, given, [1.0] * 3)
    found = found_at(model, lk.Calibration(given, loss))
    assert all(captured(G, found[name]) > 1 - SKETCHED for name, G in expected.items())


def test_directions_are_orthonormal_and_their_signs_are_settled() -> None:
    found = found_at(Net(), lk.Calibration(batches(2), loss))
    for directions in found.values():
        for basis in (directions.left, directions.right):
            torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=DECOMPOSED)
        largest = directions.left.gather(0, directions.left.abs().argmax(dim=0, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize("count", [1, 3])
def test_never_two_gradients_are_there_at_a_time(count: int) -> None:
    model = Net()
    seen: list[StorageWeakRef] = []
    alive: list[int] = []

    def watch(parameter: Tensor) -> None:
        assert parameter.grad is not None
        alive.append(sum(not storage.expired() for storage in seen))
        seen.append(StorageWeakRef(parameter.grad.untyped_storage()))

    hooks = [model.get_parameter(f"{n}.weight").register_post_accumulate_grad_hook(watch) for n in NAMES]
    found_at(model, lk.Calibration(batches(count), loss))
    for hook in hooks:
        hook.remove()
    assert len(alive) >= count * len(NAMES)
    assert max(alive) == 0


def test_parts_of_a_weight_get_their_rows_of_its_gradient() -> None:
    model, given = Net(), batches(1)
    G = mean_gradients(model, given, [1.0])["gate"]
    site = Site.at(model, "gate[0:40,80:120]")
    found = gradient_directions(model, [site], {site.path: 3}, lk.Calibration(given, loss), seeded())
    rows = torch.cat([G[:40], G[80:]])
    torch.testing.assert_close(found[site.path].values, torch.linalg.svdvals(rows)[:3], rtol=DECOMPOSED, atol=0)


def state(model: nn.Module) -> list[Any]:
    flags = [(name, p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    grads = [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
    return [flags, hooks, grads, [module.training for module in model.modules()]]


def broken(model: nn.Module, batch: Any) -> Tensor:
    return loss(model, batch) * float("nan")


@pytest.fixture
def mixed() -> Iterator[Net]:
    """A model with some layers frozen, some in training mode, one gradient; it must come out so."""
    model = Net()
    model.eval()
    model.gate.train()
    model.up.weight.requires_grad_(False)
    model.down.weight.grad = torch.ones_like(model.down.weight)
    before, grad = state(model), model.down.weight.grad
    yield model
    assert state(model) == before
    assert model.down.weight.grad is grad
    assert bool((grad == 1).all())


def test_looking_at_gradients_leaves_the_model_as_it_was(mixed: Net) -> None:
    found_at(mixed, lk.Calibration(batches(2), loss))


def test_looking_at_inputs_leaves_the_model_as_it_was(mixed: Net) -> None:
    components_of_inputs(mixed, sites_of(mixed), dict.fromkeys(NAMES, 2), lk.Calibration(batches(2), loss), 0.99)


def test_looking_leaves_the_model_as_it_was_after_an_error_too(mixed: Net) -> None:
    with pytest.raises(DataError, match="the loss on the examples is not finite: nan on batch 0"):
        found_at(mixed, lk.Calibration(batches(2), broken))


def test_another_adapter_does_not_act_while_one_looks() -> None:
    model, given = Net(), lk.Calibration(batches(2), loss)
    method = LoRA(rank=3, alpha=5, init="loraga")
    alone = lk.attach(model, method, ["down"], calibration=given, seed=2)
    expected = alone.state().sites["down"].tensors["A"]
    alone.detach()
    handle = lk.attach(model, LoRA(rank=2, alpha=3), ["gate", "down"], name="other", seed=0)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.3)
    handle.add("late", method, ["down"], calibration=given, seed=2)
    assert torch.equal(handle.state("late").sites["down"].tensors["A"], expected)


# Refusals --------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_another_layers_too_is_refused_by_name() -> None:
    model = Net()
    model.up.weight = model.gate.weight
    with pytest.raises(UnsupportedLayerError, match=r"the weight of 'gate' is shared \('gate.weight', 'up.weight'\)"):
        found_at(model, lk.Calibration(batches(1), loss))


def test_a_computed_weight_is_refused_by_name() -> None:
    model = Net()
    nn.utils.parametrizations.weight_norm(model.up)
    with pytest.raises(UnsupportedLayerError, match="the weight of 'up' is computed anew in each forward"):
        found_at(model, lk.Calibration(batches(1), loss))


def nothing_of_up(model: nn.Module, batch: Any) -> Tensor:
    return model.gate(batch["x"]).square().mean() + model.down.weight.square().mean()


def zero_at_down(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) * 0).sum() + model.gate.weight.square().sum() + model.up.weight.square().sum()


def no_gradient(model: nn.Module, batch: Any) -> Tensor:
    return loss(model, batch).detach()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (lk.Calibration([], loss), "nothing to look at: 0 batches"),
        (lk.Calibration(batches(2), loss, counted=lambda batch: torch.zeros(16, 1)), "not all padding"),
        (lk.Calibration(batches(2), loss, weight=lambda batch: 0.0), "nothing to look at: 2 batches"),
        (lk.Calibration(batches(2), loss, weight=lambda batch: -1.0), "found: batch 0 weighs -1.0, batch 1"),
        (lk.Calibration(batches(2), no_gradient), "depends on none of the weights that are looked at"),
        (lk.Calibration([{"x": torch.randn(2, 30)}]), "the examples give no loss .* give the batches labels"),
    ],
    ids=["empty", "padding", "weightless", "negative", "detached", "no loss"],
)
def test_examples_that_do_not_suffice_are_refused(calibration: lk.Calibration, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found_at(Net(), calibration)


ZERO = [
    (nothing_of_up, "the loss does not depend on 'up'", "up"),
    (zero_at_down, "the loss's gradient is zero at 'down'", "down"),
]


@pytest.mark.parametrize(("loss", "message"), [case[:2] for case in ZERO])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("init", ["loraga", "loraone"])
def test_a_start_along_a_gradient_that_is_zero_is_refused_by_name(
    init: str, count: int, loss: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        lk.attach(Net(), LoRA(rank=2, init=init), NAMES, calibration=lk.Calibration(batches(count), loss))


@pytest.mark.parametrize(("loss", "dead"), [case[::2] for case in ZERO])
@pytest.mark.parametrize("count", [1, 2])
def test_ranks_leave_a_layer_alone_whose_gradient_is_zero(count: int, loss: Any, dead: str) -> None:
    method = LoRA(rank="auto", budget=450)
    handle = lk.attach(Net(), method, NAMES, calibration=lk.Calibration(batches(count), loss))
    assert dead not in handle.updates()


def test_batches_without_anything_to_learn_do_not_count() -> None:
    model, given = Net(), batches(3)
    empty = id(given[1])
    expected = mean_gradients(model, [given[0], given[2]], [1.0, 1.0])["down"]
    found = found_at(model, lk.Calibration(given, loss, weight=lambda batch: float(id(batch) != empty)))
    torch.testing.assert_close(found["down"].values, torch.linalg.svdvals(expected)[:4], rtol=SKETCHED, atol=0)


@pytest.mark.parametrize(("rows", "taken"), [(1, 1), (16, 1), (17, 2), (1000, 3)])
def test_no_more_batches_are_taken_than_hold_the_rows(rows: int, taken: int) -> None:
    found = lk.Calibration(batches(3), loss).first(rows).batches
    assert [num_rows(batch) for batch in found] == [16] * taken


# Inputs ----------------------------------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_share_it() -> None:
    model = Net()
    leaders = shared_inputs(model, sites_of(model), lk.Calibration(batches(1), loss))
    assert leaders == {"gate": "gate", "up": "gate", "down": "down"}


def test_padding_is_left_out_of_the_inputs() -> None:
    x = torch.randn(4, 5, 30)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    seen: list[Tensor] = []
    calibration = lk.Calibration([{"x": x, "attention_mask": mask}])
    look_at_inputs(Net(), ["gate"], calibration, lambda host, rows: seen.append(rows))
    assert torch.equal(torch.cat(seen), x[mask.bool()])


class Pooled(Net):
    """Reads one position of each row, as a classifier's head does."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, goal: Tensor | None = None) -> Tensor:
        return super().forward(x[:, 0])


class Cut(Net):
    """Reads other positions than the batch has, as a decoder beside an encoder does."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, goal: Tensor | None = None) -> Tensor:
        return super().forward(x[:, :2])


def test_one_vector_for_each_row_is_no_padding() -> None:
    seen: list[Tensor] = []
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    calibration = lk.Calibration([{"x": torch.randn(2, 3, 30), "attention_mask": mask}])
    look_at_inputs(Pooled(), ["gate"], calibration, lambda host, rows: seen.append(rows))
    assert seen[0].shape == (2, 30)


def test_inputs_whose_padding_cannot_be_told_are_refused_by_name() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    calibration = lk.Calibration([{"x": torch.randn(2, 3, 30), "attention_mask": mask}])
    with pytest.raises(DataError, match=r"inputs of 'gate' are \(2, 2, 30\), the batch's positions \(2, 3\)"):
        look_at_inputs(Cut(), ["gate"], calibration, lambda host, rows: None)


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    calibration = lk.Calibration([{"x": torch.full((2, 3, 30), torch.inf)}])
    with pytest.raises(DataError, match="inputs of 'gate' on the examples are not finite"):
        look_at_inputs(Net(), ["gate"], calibration, lambda host, rows: None)


def test_the_inputs_of_a_fused_transformer_layer_are_seen() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True))
    seen: list[Tensor] = []
    calibration = lk.Calibration([{"input": torch.randn(2, 5, 16)}])
    look_at_inputs(model, ["0.linear2"], calibration, lambda host, rows: seen.append(rows))
    assert seen[0].shape == (10, 24)


@pytest.mark.parametrize("sizes", [[40, 3, 200, 57], [300], [1] * 90], ids=["uneven", "one", "rows"])
def test_components_that_come_bit_by_bit_are_those_of_all_rows(sizes: list[int]) -> None:
    rows = torch.randn(sum(sizes), 50) / torch.arange(1, 51) @ torch.randn(50, 50) + 3 * torch.randn(50)
    components = Components(5)
    for part in rows.split(sizes):
        components.add(part)
    centred = (rows - rows.mean(dim=0)).double()
    squares = torch.linalg.svdvals(centred).square()
    torch.testing.assert_close(components.ratios(), squares[:5] / squares.sum(), rtol=DECOMPOSED, atol=DECOMPOSED)
    own = (centred @ components.directions().double().T).square().sum() / squares[:5].sum()
    assert float(own) == pytest.approx(1.0, abs=DECOMPOSED)


def test_looking_at_inputs_stops_by_itself() -> None:
    torch.manual_seed(0)
    used: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        used.append(1)
        return loss(model, batch)

    steady = [{"x": torch.randn(64, 30) / torch.arange(1, 31) ** 2, "goal": torch.randn(64, 100)} for _ in range(40)]
    components_of_inputs(Net(), sites_of(Net(), ["gate"]), {"gate": 2}, lk.Calibration(steady, counted), 0.99)
    assert 2 < sum(used) < 20
