"""EVA: the pair reads the principal components of its layer's inputs, without padding, and stops by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import DataError, UnsupportedLayerError
from lorakit.methods.lora import LoRA

RANK, ALPHA, WIDTH = 4, 10.0, 48
EVA = LoRA(rank=RANK, alpha=ALPHA, init="eva")


class Net(nn.Module):
    """Two layers that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 36)
        self.table = nn.Embedding(7, 5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return torch.cat([self.q(x), self.v(x)], dim=-1)


def rows_of(count: int, power: float = 1.0) -> Tensor:
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    return torch.randn(count, 10, WIDTH) * torch.arange(1, WIDTH + 1) ** -power @ directions + torch.randn(WIDTH)


def padded(x: Tensor, garbage: float) -> tuple[lk.Calibration, Tensor]:
    mask = torch.arange(10)[None] < torch.randint(4, 11, (len(x), 1))
    filled = torch.where(mask[..., None], x, garbage)
    pairs = zip(filled.split(8), mask.long().split(8), strict=True)
    return lk.Calibration([{"x": a, "attention_mask": b} for a, b in pairs]), mask


def start(calibration: lk.Calibration, method: LoRA = EVA, **fields: Any) -> dict[str, Tensor]:
    handle = lk.attach(Net(), method, ["q", "v"], calibration=calibration, seed=0, **fields)
    return {name: p.detach() for name, p in handle.parameters().items()}


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_explains_as_much_variance_as_an_exact_pca_through_padding(seed: int, power: float) -> None:
    torch.manual_seed(seed)
    x = rows_of(64, power)
    calibration, mask = padded(x, garbage=50.0)
    A = start(calibration)["q.A"]
    centred = x[mask] - x[mask].mean(dim=0)
    exact = torch.linalg.svdvals(centred)[:RANK].square().sum()
    assert float((centred @ A.T).square().sum() / exact) >= 0.95


def test_rows_of_a_are_orthonormal_and_b_is_zero() -> None:
    found = start(padded(rows_of(64), 0.0)[0])
    torch.testing.assert_close(found["v.A"] @ found["v.A"].T, torch.eye(RANK), rtol=0, atol=1e-5)
    assert not bool(found["v.B"].any())


def test_layers_that_read_one_input_start_with_one_a() -> None:
    found = start(padded(rows_of(64), 0.0)[0])
    assert torch.equal(found["q.A"], found["v.A"])


def test_what_stands_in_the_padding_does_not_matter() -> None:
    x = rows_of(32)
    torch.manual_seed(1)
    first = start(padded(x, 0.0)[0])
    torch.manual_seed(1)
    second = start(padded(x, 1e3)[0])
    assert torch.equal(first["q.A"], second["q.A"])


def test_too_few_tokens_for_the_rank_are_refused_by_name() -> None:
    calibration = lk.Calibration([{"x": torch.randn(1, RANK, WIDTH)}])
    with pytest.raises(DataError, match=rf"'q' needs more than {RANK} and has {RANK}.*Give more examples, or a lower"):
        start(calibration)


def test_a_layer_without_rows_as_inputs_is_refused_before_the_model_runs() -> None:
    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("the model has run")

    calibration = lk.Calibration([{"x": torch.randn(2, 10, WIDTH)}], never)
    with pytest.raises(UnsupportedLayerError, match="'table': an embedding's inputs are indices"):
        lk.attach(Net(), EVA, ["q", "table"], calibration=calibration)


def test_without_examples_it_says_what_to_give() -> None:
    with pytest.raises(lk.InputError, match=r"init 'eva' looks at the layers' inputs on examples: .*Calibration"):
        lk.attach(Net(), EVA, ["q"])


def test_no_more_batches_are_read_than_needed() -> None:
    torch.manual_seed(0)
    read: list[int] = []

    def run(model: nn.Module, batch: Any) -> Tensor:
        read.append(1)
        return model(**batch)

    x = rows_of(400, 2.0)
    start(lk.Calibration([{"x": part} for part in x.split(10)], run))
    assert len(read) < 25
