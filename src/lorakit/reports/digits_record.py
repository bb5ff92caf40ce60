"""What the digits demo found, as plain values: its table, its pictures and its page read these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """One pass over the test images.

    Attributes:
        confusion: ``[10][10]`` counts, row = the digit, column = what it was taken for.
        errors: wrongly read images of each digit; ``total`` of all digits.
        accuracy: share of images read rightly, in [0, 1].
    """

    confusion: tuple[tuple[int, ...], ...]
    errors: tuple[int, ...]
    total: int
    accuracy: float

    @classmethod
    def of(cls, confusion: tuple[tuple[int, ...], ...]) -> Measured:
        """Count errors in a confusion matrix."""
        errors = tuple(sum(row) - row[digit] for digit, row in enumerate(confusion))
        return cls(confusion, errors, sum(errors), 1.0 - sum(errors) / sum(map(sum, confusion)))

    def taken_for(self, digit: int) -> int:
        """Count the images of other digits that were read as ``digit``."""
        return sum(row[digit] for truth, row in enumerate(self.confusion) if truth != digit)


@dataclass(frozen=True)
class ChangedDigit:
    """A test image that is read otherwise than before: its number in the test, the truth, and both readings."""

    index: int
    truth: int
    before: int
    after: int


@dataclass(frozen=True)
class LayerUpdate:
    """What one adapter adds to one layer.

    Attributes:
        path: the layer.
        d_in, d_out: its sizes.
        num_numbers: the adapter's numbers here.
        singular_values: of ``scale B A``, largest first; one, for the rank is 1.
        relative_norm: Frobenius norm of ``scale B A`` over that of the base weight.
    """

    path: str
    d_in: int
    d_out: int
    num_numbers: int
    singular_values: tuple[float, ...]
    relative_norm: float


@dataclass(frozen=True)
class Claim:
    """Something that must be so, whether it is, and what was compared."""

    claim: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Adapted:
    """One adapter: how it was trained, what came of it and what it adds.

    Attributes:
        name: 'alone' or 'replay'.
        after: the test with the adapter.
        repaired: images read wrongly before and rightly now.
        broken: images read rightly before and wrongly now.
        layers: what it adds to each layer.
    """

    name: str
    after: Measured
    repaired: tuple[ChangedDigit, ...]
    broken: tuple[ChangedDigit, ...]
    layers: tuple[LayerUpdate, ...]


@dataclass(frozen=True)
class Recipe:
    """The settings, all of them: the same for both adapters but for the replayed images.

    Attributes:
        base_lr, base_batch: of the network's one epoch.
        lr: of the adapters.
        num_batches: that each adapter sees.
        num_own: images of the worst digit in a batch; ``num_replayed`` those of other digits with replay.
        rank, alpha: of the adapters; ``scale`` is alpha / rank.
    """

    base_lr: float
    base_batch: int
    lr: float
    num_batches: int
    num_own: int
    num_replayed: int
    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class DigitsSummary:
    """Everything the demo reports; stored as ``digits.json``.

    Attributes:
        source: whose digits, and how they were parted.
        data: the folder that was given; None for the digits of scikit-learn.
        network: the layers' sizes.
        seed: of the parting, the network and the batches.
        num_fit, num_choice, num_test: images trained on, chosen by, and tested on.
        digit: the one the adapters are trained on; ``asked`` if the user named it.
        choice_counts, choice_errors: images and errors of each digit where the worst was found.
        before: the test with the network alone; ``disabled`` with the adapters attached but switched off.
        adapters: 'alone' and 'replay'.
        num_added: numbers of one adapter; ``num_base`` those of the network.
        percent: the former in percent of the latter.
        claims: what was proven.
        digest: sha256 over every byte of the network.
        seconds: wall time of the experiment, drawing left out.
    """

    source: str
    data: str | None
    network: tuple[int, ...]
    seed: int
    num_fit: int
    num_choice: int
    num_test: int
    digit: int
    asked: bool
    choice_counts: tuple[int, ...]
    choice_errors: tuple[int, ...]
    recipe: Recipe
    before: Measured
    disabled: Measured
    adapters: tuple[Adapted, ...]
    num_added: int
    num_base: int
    percent: float
    claims: tuple[Claim, ...]
    digest: str
    seconds: float
    version: str = field(default="")

    def adapter(self, name: str) -> Adapted:
        """Return the adapter called ``name``."""
        return next(adapter for adapter in self.adapters if adapter.name == name)
