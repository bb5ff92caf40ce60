"""The digits of the digits demo: scikit-learn's, or MNIST's from a folder, in three parts.

The first part trains, the second one only says which digit is the worst, the third one only measures:
a test that had a say in the choice would flatter what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.demos.idx import read_idx
from lorakit.errors import DataError, InputError, bullet_list, quoted

SIDE = 28
NUM_DIGITS = 10
# Mean and standard deviation of MNIST's training pixels as shares of 255, the usual scaling of its lessons.
MEAN, DEVIATION = 0.1307, 0.3081
CHOICE_SHARE = 0.2
FOLDER_TEST_SHARE = 0.2
# Below this a digit cannot be in all three parts and say something in each.
LEAST_OF_EACH = 10
_SETS = {"train": "training images", "t10k": "test images"}
_LISTED = 12


@dataclass(frozen=True)
class Part:
    """Some images of digits.

    Attributes:
        pixels: ``[n, 28, 28]`` bytes, 0 paper and 255 ink.
        labels: ``[n]``, the digits they show.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> Tensor:
        """Return what a network sees, ``[n, 28, 28]`` in fp32."""
        return (self.pixels.float() / 255.0 - MEAN) / DEVIATION

    def at(self, index: Tensor) -> Part:
        """Return the images with these numbers."""
        return Part(self.pixels[index], self.labels[index])

    def num_of_each(self) -> list[int]:
        """Count the images of each digit."""
        return torch.bincount(self.labels, minlength=NUM_DIGITS).tolist()


@dataclass(frozen=True)
class DigitsData:
    """The three parts, and where they come from.

    Attributes:
        fit: what is trained on.
        choice: what the worst digit is found on.
        test: what everything is measured on.
        source: whose digits these are and how they were parted, in a sentence or two.
        folder: what was read; None for scikit-learn's digits.
    """

    fit: Part
    choice: Part
    test: Part
    source: str
    folder: str | None


def read_digits(folder: str | Path | None = None, seed: int = 0) -> DigitsData:
    """Read scikit-learn's digits, or MNIST's files from ``folder``, and part them.

    Args:
        folder: holds idx files; None for scikit-learn's digits.
        seed: of the parting.

    Raises:
        InputError: scikit-learn is not installed.
        DataError: a file is missing or broken, images are of another size, or a digit is missing.
    """
    chance = torch.Generator().manual_seed(seed)
    if folder is None:
        train, test = parted(bundled_digits(), 0.5, chance)
        source = (
            f"{len(train) + len(test):,} handwritten digits that come with scikit-learn, 8 x 8 pixels enlarged to "
            f"{SIDE} x {SIDE}, split in halves. The same people wrote both halves."
        )
    else:
        sets = read_folder(Path(folder).expanduser())
        if len(sets) == 2:
            train, test = sets["train"], sets["t10k"]
            source = f"MNIST's {len(train):,} training and {len(test):,} test images from '{folder}'."
        else:
            [(name, only)] = sets.items()
            train, test = parted(only, FOLDER_TEST_SHARE, chance)
            source = (
                f"'{folder}' holds only MNIST's {len(only):,} {_SETS[name]}: "
                f"split at random into {len(train):,} to train on and {len(test):,} to test on."
            )
    fit, choice = parted(train, CHOICE_SHARE, chance)
    return DigitsData(fit, choice, test, source, None if folder is None else str(folder))


def bundled_digits() -> Part:
    """Return scikit-learn's 8 x 8 digits with values 0 to 16, enlarged and scaled to bytes as MNIST's are.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "the demo needs the package 'scikit-learn', whose handwritten digits it learns. "
            "Install it: pip install 'lorakit[demo]', or give a folder with MNIST's files: --data FOLDER"
        ) from None
    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float() / 16.0
    large = F.interpolate(small[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    return Part((255.0 * large).round().to(torch.uint8), torch.from_numpy(bunch.target).long())


def parted(part: Part, share: float, chance: torch.Generator) -> tuple[Part, Part]:
    """Part images at random, ``share`` of each digit going to the second part; both come shuffled."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    for digit in range(NUM_DIGITS):
        places = (part.labels == digit).nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=chance)]
        cut = round(share * len(places))
        second.append(places[:cut])
        first.append(places[cut:])
    one, other = torch.cat(first), torch.cat(second)
    return (
        part.at(one[torch.randperm(len(one), generator=chance)]),
        part.at(other[torch.randperm(len(other), generator=chance)]),
    )


def read_folder(folder: Path) -> dict[str, Part]:
    """Read the sets in a folder: 'train', 't10k' or both.

    Raises:
        DataError: see :func:`read_digits`; every problem is named.
    """
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise DataError(f"--data '{folder}': {found}. Give a folder with MNIST's idx files, such as {_wanted('t10k')}.")
    problems: list[str] = []
    files: dict[str, tuple[Path, Path]] = {}
    for name in _SETS:
        images, labels = (_find(folder, _names(name, kind)) for kind in ("images", "labels"))
        if images and labels:
            files[name] = images, labels
        elif images or labels:
            there, kind = (images, "labels") if images else (labels, "images")
            assert there is not None
            problems.append(f"'{there.name}' is there without its {kind}: looked for {quoted(_names(name, kind))}")
    if not files and not problems:
        wanted = [variant for name in _SETS for kind in ("images", "labels") for variant in _names(name, kind)[:1]]
        raise DataError(
            f"--data '{folder}' has none of MNIST's files. Looked for {quoted(wanted)}, also with .gz at the end and "
            f"with '.idx' instead of '-idx'; found {_listing(folder)}."
        )
    sets: dict[str, Part] = {}
    for name, (images, labels) in files.items():
        part = _read_pair(images, labels, problems)
        if part is not None:
            sets[name] = part
    if problems:
        raise DataError(f"--data '{folder}' cannot be used: {bullet_list(problems)}")
    return sets


def _names(name: str, kind: str) -> list[str]:
    dims = {"images": 3, "labels": 1}[kind]
    return [f"{name}-{kind}{mark}idx{dims}-ubyte{end}" for mark in "-." for end in ("", ".gz")]


def _wanted(name: str) -> str:
    return quoted([_names(name, kind)[1] for kind in ("images", "labels")])


def _find(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _listing(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    return f"there: {quoted(names, _LISTED)}" if names else "an empty folder"


def _read_pair(images: Path, labels: Path, problems: list[str]) -> Part | None:
    """Read images with their labels; on a problem add it and return None."""
    read: list[Tensor] = []
    for path, num_dims in ((images, 3), (labels, 1)):
        try:
            read.append(read_idx(path, num_dims))
        except DataError as error:
            problems.append(str(error))
    if len(read) < 2:
        return None
    pixels, digits = read
    found = _problem_of(pixels, digits, images, labels)
    if found is not None:
        problems.append(found)
        return None
    return Part(pixels, digits.long())


def _problem_of(pixels: Tensor, digits: Tensor, images: Path, labels: Path) -> str | None:
    """Say what is wrong with images and labels that were read, each for itself, without trouble."""
    height, width = pixels.shape[1:]
    if (height, width) != (SIDE, SIDE):
        return (
            f"'{images.name}' holds images of {height} x {width} pixels; the network takes {SIDE} x {SIDE}. "
            "Give MNIST's own images, or enlarge these first."
        )
    if len(pixels) != len(digits):
        return (
            f"'{images.name}' holds {len(pixels):,} images and '{labels.name}' {len(digits):,} labels. "
            "Take both from one copy of the data."
        )
    if len(digits) and int(digits.max()) >= NUM_DIGITS:
        return f"'{labels.name}' has labels up to {int(digits.max())}; digits go from 0 to {NUM_DIGITS - 1}."
    counts = torch.bincount(digits.long(), minlength=NUM_DIGITS).tolist()
    few = [f"{digit} ({count or 'none'})" for digit, count in enumerate(counts) if count < LEAST_OF_EACH]
    if few:
        return (
            f"'{labels.name}' has too few images of {'digit' if len(few) == 1 else 'the digits'} {', '.join(few)}; "
            f"at least {LEAST_OF_EACH} of each are needed."
        )
    return None
