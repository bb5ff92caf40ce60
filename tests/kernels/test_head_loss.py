"""The loss of a frozen head in pieces is torch's cross-entropy of its logits, and so is its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.kernels import head_loss as kernel
from lorakit.kernels.head_loss import IDENTITY, Curve, head_guesses, head_loss
from lorakit.training.memory import peak_bytes

CURVES = {"as it is": IDENTITY, "scaled": Curve(0.3), "capped": Curve(1.7, 4.0)}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a few rows into several pieces and tiles, the last ones shorter."""
    monkeypatch.setattr(kernel, "piece_rows", lambda words, hidden: 5)
    monkeypatch.setattr(kernel, "TILE_NUMBERS", 2 * 37)


def case(dtype: torch.dtype, count: int = 13, width: int = 8, words: int = 37, bias: bool = False) -> list[Any]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, width).to(dtype).requires_grad_(), torch.randn(words, width).to(dtype)
    return [hidden, weight, torch.randn(words).to(dtype) if bias else None, torch.randint(words, (count,))]


def expected_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, curve: Curve) -> Tensor:
    """Compute in float64 from the same rounded numbers."""
    wide = None if bias is None else bias.double()
    return F.cross_entropy(curve(F.linear(hidden.double(), weight.double(), wide)), labels, reduction="sum")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_stands_the_check_in_float64(curve: Curve, bias: bool) -> None:
    hidden, *rest = case(torch.float64, bias=bias)
    assert torch.autograd.gradcheck(lambda x: head_loss(x, *rest, curve), (hidden,))


# fp32: sums of 8 products and 37 exponentials. Half dtypes: scores of size 3 are rounded to 2^-9 (bf16) and 2^-12 of
# themselves, so that a share has that error times 3 or so; the loss is a sum of 13 such errors of either sign.
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "loss_error", "error"),
    [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 5e-3, 1e-2), (torch.float16, 1e-3, 2e-3)],
)
def test_loss_and_gradient_are_the_cross_entropys(
    dtype: torch.dtype, loss_error: float, error: float, bias: bool, curve: Curve
) -> None:
    given = case(dtype, bias=bias)
    hidden = given[0]
    loss, expected = head_loss(*given, curve), expected_loss(*given, curve)
    (found,), (wanted,) = torch.autograd.grad(0.1 * loss, hidden), torch.autograd.grad(0.1 * expected, hidden)
    assert loss.dtype == torch.float32
    assert found.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=loss_error)
    assert float((found.double() - wanted.double()).norm()) <= error * float(wanted.double().norm())


@pytest.mark.parametrize(("count", "words"), [(0, 7), (1, 7), (600, 5000)])
def test_any_number_of_positions_and_words(count: int, words: int) -> None:
    given = case(torch.float32, count=count, words=words)
    loss, expected = head_loss(*given), expected_loss(*given, IDENTITY)
    (found,), (wanted,) = torch.autograd.grad(loss, given[0]), torch.autograd.grad(expected, given[0])
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Loss scales and numbers of tokens that neither fp16's largest number nor its smallest would stand.
@pytest.mark.parametrize("above", [65536.0, 3.0, 1e-6])
def test_in_fp16_what_comes_from_above_neither_overflows_nor_vanishes(above: float) -> None:
    given = case(torch.float16)
    (found,) = torch.autograd.grad(head_loss(*given), given[0], torch.tensor(above / 100))
    (wanted,) = torch.autograd.grad(expected_loss(*given, IDENTITY), given[0], torch.tensor(above / 100).double())
    assert found.isfinite().all()
    # Beside the rounding of 2e-3, fp16 has no gradient below 6e-8: half of that at each number.
    room = 2e-3 * float(wanted.double().norm()) + 3e-8 * wanted.numel() ** 0.5
    assert float((found.double() - wanted.double()).norm()) <= room


def test_a_share_that_fp16_cannot_tell_from_zero_counts() -> None:
    words = 4096
    hidden, weight = torch.ones(1, 1, dtype=torch.float16).requires_grad_(), torch.full((words, 1), -17.0)
    weight[0] = 0.0
    labels, half = torch.tensor([0]), weight.half()
    (found,) = torch.autograd.grad(head_loss(hidden, half, None, labels), hidden)
    # 4095 words with a share of e^-17 = 4e-8 each, and their weight of -17.
    torch.testing.assert_close(found, torch.tensor([[-17 * 4095 * 4.14e-8]]).half(), rtol=2e-2, atol=0.0)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_guesses_are_the_likeliest_words_and_the_loss_is_the_same(curve: Curve) -> None:
    hidden, weight, bias, labels = case(torch.float32, bias=True)
    loss, guesses = head_guesses(hidden, weight, bias, labels, curve)
    assert torch.equal(guesses, curve(F.linear(hidden, weight, bias)).argmax(-1))
    assert torch.equal(loss, head_loss(hidden, weight, bias, labels, curve).detach())


def test_words_that_nobody_can_say_have_no_share() -> None:
    hidden, weight, bias, labels = case(torch.float32, bias=True)
    bias[30:], labels = -torch.inf, labels % 30
    (found,) = torch.autograd.grad(head_loss(hidden, weight, bias, labels), hidden)
    (wanted,) = torch.autograd.grad(head_loss(hidden, weight[:30], bias[:30], labels), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_only_the_hidden_states_get_a_gradient() -> None:
    hidden, weight, bias, labels = case(torch.float32, bias=True)
    head_loss(hidden, weight.requires_grad_(), bias.requires_grad_(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_without_gradients_none_is_made() -> None:
    hidden, *rest = case(torch.float32, count=256, width=512, words=16)

    def peak(learns: bool) -> int:
        with torch.set_grad_enabled(learns):
            return peak_bytes(lambda: head_loss(hidden, *rest), torch.device("cpu"))

    assert peak(True) - peak(False) >= hidden.nbytes
    assert peak(False) < hidden.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scores_are_never_all_there(dtype: torch.dtype) -> None:
    count, words = 1024, 16_384
    hidden, *rest = case(dtype, count=count, width=4, words=words)
    found = peak_bytes(lambda: head_loss(hidden, *rest).backward(), torch.device("cpu"))
    # A piece, a tile in fp32 with what is made of it, and the gradients.
    assert found <= kernel.PIECE_BYTES["cpu"] + 3 * 4 * kernel.TILE_NUMBERS + 8 * hidden.nbytes
    assert found < count * words * hidden.element_size() / 1.5


def test_it_runs_on_tensors_without_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(2000, 8, dtype=torch.bfloat16, requires_grad=True)
        loss = head_loss(hidden, torch.empty(9000, 8, dtype=torch.bfloat16), None, torch.zeros(2000, dtype=torch.int64))
        loss.backward()
        assert loss.shape == ()
        assert hidden.grad is not None
        assert hidden.grad.shape == hidden.shape
