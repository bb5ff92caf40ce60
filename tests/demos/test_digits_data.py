"""The digits: how they are parted, and which folders are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lorakit.demos.digits_data import DigitsData, Part, bundled_digits, parted, read_digits, read_folder
from lorakit.errors import DataError, InputError

from .conftest import Write, some_digits

PIXELS, LABELS = some_digits()
# Bilinear enlargement weighs pixels at the edge a little differently; on 1,797 images means agree to 1 %.
MEAN_TOLERANCE = 0.01


@pytest.fixture(scope="module")
def bundled() -> Part:
    pytest.importorskip("sklearn", reason="the extra 'demo' is not installed")
    return bundled_digits()


def test_the_bundled_digits_look_like_mnists(bundled: Part) -> None:
    assert bundled.pixels.shape == (1797, 28, 28)
    assert bundled.pixels.dtype == torch.uint8
    assert (int(bundled.pixels.min()), int(bundled.pixels.max())) == (0, 255)
    assert min(bundled.num_of_each()) > 170


def test_enlarging_keeps_the_ink(bundled: Part) -> None:
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images).float() / 16
    assert bundled.pixels.float().mean() / 255 == pytest.approx(float(small.mean()), rel=MEAN_TOLERANCE)


def numbered(count: int = 400) -> Part:
    """Make images that carry their own number, so that each can be found again."""
    pixels = torch.arange(count).view(-1, 1, 1).repeat(1, 28, 28).to(torch.int32)
    return Part(pixels, torch.arange(count) % 10)


def test_parts_hold_every_image_once_and_equal_shares_of_each_digit() -> None:
    first, second = parted(numbered(), 0.25, torch.Generator().manual_seed(0))
    assert sorted([*first.pixels[:, 0, 0].tolist(), *second.pixels[:, 0, 0].tolist()]) == list(range(400))
    assert second.num_of_each() == [10] * 10


@pytest.mark.parametrize("part", ["fit", "choice", "test"])
def test_the_seed_alone_decides_the_parts(bundled: Part, part: str) -> None:
    once, again, other = (getattr(read_digits(seed=seed), part) for seed in (3, 3, 4))
    assert torch.equal(once.pixels, again.pixels)
    assert not torch.equal(once.labels, other.labels)


def sizes(data: DigitsData) -> tuple[int, int, int]:
    return len(data.fit), len(data.choice), len(data.test)


def test_the_bundled_digits_are_split_in_halves(bundled: Part) -> None:
    fit, choice, test = sizes(read_digits())
    assert fit + choice + test == 1797
    assert abs(fit + choice - test) <= 10  # each digit is halved for itself, and ten of them may be odd


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
def test_a_folder_is_read_in_every_spelling(mnist: Write, mark: str, gz: bool) -> None:
    part = read_folder(mnist(PIXELS, LABELS, mark=mark, gz=gz))["t10k"]
    assert torch.equal(part.pixels, PIXELS)
    assert part.labels.tolist() == LABELS.tolist()


def test_only_test_images_are_split_and_that_is_said(mnist: Write) -> None:
    data = read_digits(mnist(PIXELS, LABELS))
    assert sizes(data) == (130, 30, 40)
    assert "holds only MNIST's 200 test images: split at random into 160 to train on and 40 to test on" in data.source


def test_where_both_sets_are_there_the_test_is_the_publishers(mnist: Write) -> None:
    more, labels = some_digits(400, seed=1)
    mnist(more, labels, name="train")
    data = read_digits(mnist(PIXELS, LABELS))
    assert sizes(data) == (320, 80, 200)
    assert torch.equal(data.test.pixels, PIXELS)
    assert "400 training and 200 test images" in data.source


@pytest.mark.parametrize(
    ("pixels", "labels", "said"),
    [
        (some_digits(side=32)[0], LABELS, "holds images of 32 x 32 pixels; the network takes 28 x 28"),
        (PIXELS[:-3], LABELS, "holds 197 images and 't10k-labels-idx1-ubyte' 200 labels"),
        (PIXELS, LABELS + 1, "has labels up to 10; digits go from 0 to 9"),
        (PIXELS, LABELS.where(LABELS != 7, 1), r"too few images of digit 7 \(none\)"),
        (PIXELS[:97], LABELS[:97], r"too few images of the digits 7 \(9\), 8 \(9\), 9 \(9\)"),
        (PIXELS, None, "'t10k-images-idx3-ubyte' is there without its labels: looked for 't10k-labels-idx1-ubyte'"),
        (None, LABELS, "'t10k-labels-idx1-ubyte' is there without its images"),
    ],
    ids=["size", "counts", "letters", "digit missing", "few", "no labels", "no images"],
)
def test_data_that_does_not_fit_is_refused(mnist: Write, pixels: torch.Tensor, labels: torch.Tensor, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_folder(mnist(pixels, labels))


def test_every_problem_of_a_folder_is_named(mnist: Write) -> None:
    folder = mnist(PIXELS, LABELS[:-1], name="train")
    mnist(PIXELS, None)
    (folder / "train-labels-idx1-ubyte").write_bytes(b"what")
    with pytest.raises(DataError, match="2 problems") as refused:
        read_folder(folder)
    assert "magic number 0x77686174" in str(refused.value)
    assert "without its labels" in str(refused.value)


def test_a_folder_without_the_files_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "cats.zip").touch()
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(DataError, match="Looked for 'train-images-idx3-ubyte'") as refused:
        read_folder(tmp_path)
    assert "there: 'MNIST/', 'cats.zip'" in str(refused.value)


@pytest.mark.parametrize(("make", "said"), [(Path.touch, "it is a file"), (lambda path: None, "no such folder")])
def test_what_is_no_folder_is_refused(tmp_path: Path, make: object, said: str) -> None:
    assert callable(make)
    make(tmp_path / "data")
    with pytest.raises(DataError, match=said):
        read_folder(tmp_path / "data")


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'lorakit\[demo\]'"):
        read_digits()
