"""The digits demo: a network's worst digit is mended by 0.24 % more numbers, and what that costs is counted.

A far too large network learns handwritten digits in one epoch. Its worst digit is found. A LoRA of rank 1
on all its layers is then trained on that digit alone, as many lessons do it; a second one sees the same
images of it and, in each batch, some of the other digits as well (replay). The first one forgets, the second
does not; switched off, either leaves the network as it was, bit for bit.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.adapters import Handle, attach
from lorakit.adapters.identity import base_parameters, digest
from lorakit.demos.digits_data import NUM_DIGITS, SIDE, DigitsData, Part, read_digits
from lorakit.demos.digits_proof import changed, claims, layer_updates
from lorakit.demos.replacing import check_replaceable, replacing
from lorakit.errors import VerificationError, bullet_list
from lorakit.files import atomic_write, write_json, write_text
from lorakit.formats.store import save_adapter
from lorakit.formats.tensors import TensorFile, write_tensors
from lorakit.methods.lora import LoRA
from lorakit.records import to_json
from lorakit.reports.digits import render_page
from lorakit.reports.digits_figures import overview_picture
from lorakit.reports.digits_record import Adapted, DigitsSummary, Measured, Recipe
from lorakit.training.observe import Observer
from lorakit.version import __version__

SIZES = (SIDE * SIDE, 1000, 2000, NUM_DIGITS)
LAYERS = ("linear1", "linear2", "linear3")
SUMMARY_FILE, BASE_FILE, REPORT_FILE, PICTURE_FILE = "digits.json", "base.safetensors", "report.html", "digits.png"
# As the lessons do it (Adam at 1e-3, batches of ten), but for alpha, which they set to the rank: a scale of 1
# would hide its own absence.
METHOD = LoRA(rank=1, alpha=2)
RECIPE = Recipe(
    base_lr=1e-3,
    base_batch=10,
    lr=1e-3,
    num_batches=100,
    num_own=10,
    num_replayed=10,
    rank=METHOD.rank_at(LAYERS[0]),
    alpha=METHOD.alpha,
    scale=METHOD.scale_at(LAYERS[0]),
)


@dataclass(frozen=True)
class DigitsResult:
    """What the demo made: its summary, and the folder with adapters, network, report and picture."""

    summary: DigitsSummary
    folder: Path
    report: Path
    picture: Path


def run(
    output: str | Path = "lorakit-demo/digits",
    data: str | Path | None = None,
    seed: int = 0,
    digit: int | None = None,
    observer: Observer | None = None,
) -> DigitsResult:
    """Do the experiment and write its folder, whole or not at all.

    Args:
        output: the folder; an earlier run of this demo there is replaced.
        data: a folder with MNIST's idx files; None for scikit-learn's digits.
        seed: of the parting of the images, of the network and of the batches.
        digit: what the adapters are trained on; None for the worst.
        observer: is told how it goes.

    Raises:
        InputError: the data or the output cannot be used.
        VerificationError: something that must be so is not; nothing is written.
    """
    watcher = observer or Observer()
    folder = Path(output).expanduser()
    check_replaceable(folder, SUMMARY_FILE)
    watcher.stage("reading the digits")
    digits = read_digits(data, seed)
    with one_thread():
        handle, summary = experiment(digits, seed, digit, watcher)
    failed = [f"{claim.claim}: {claim.detail}" for claim in summary.claims if not claim.passed]
    if failed:
        raise VerificationError(f"not proven: {bullet_list(failed)}. Nothing was written.")
    pixels = digits.test.pixels.numpy()
    with replacing(folder, SUMMARY_FILE) as fresh:
        watcher.stage("saving network and adapters")
        with atomic_write(fresh / BASE_FILE) as temporary:
            write_tensors(temporary, TensorFile(dict(base_parameters(handle.model))))
        for name in handle.names:
            save_adapter(handle, fresh / name, name, base_name=BASE_FILE)
        write_json(fresh / SUMMARY_FILE, to_json(summary))
        watcher.stage("drawing the report")
        write_text(fresh / REPORT_FILE, render_page(summary, pixels, str(folder)))
        with atomic_write(fresh / PICTURE_FILE) as temporary:
            temporary.write_bytes(overview_picture(summary, pixels))
    return DigitsResult(summary, folder, folder / REPORT_FILE, folder / PICTURE_FILE)


def experiment(
    data: DigitsData, seed: int, digit: int | None = None, observer: Observer | None = None
) -> tuple[Handle, DigitsSummary]:
    """Train network and adapters, and measure.

    Returns:
        The handle on the network, with the adapters 'alone' and 'replay', and what was found.
    """
    started = time.monotonic()
    watcher = observer or Observer()
    watcher.stage(f"training the network on {len(data.fit):,} images")
    model = network(seed)
    train(model, model.parameters(), one_epoch(data.fit, seed), RECIPE.base_lr)
    on_choice, before = logits_of(model, data.choice), logits_of(model, data.test)
    chosen = worst_digit(on_choice, data.choice) if digit is None else digit
    digest_before = digest(model)

    for name, num_others in (("alone", 0), ("replay", RECIPE.num_replayed)):
        watcher.stage(f"training the adapter '{name}' on the digit {chosen}")
        handle = attach(model, METHOD, targets=LAYERS, name=name, seed=seed)
        batches = batches_of(data.fit, chosen, num_others, seed)
        train(model, handle.parameters(name).values(), batches, RECIPE.lr)

    watcher.stage("measuring and proving")
    adapters = tuple(adapted(handle, name, before, data.test) for name in handle.names)
    with handle.disabled():
        disabled = logits_of(model, data.test)
    counts = handle.counts("alone")
    summary = DigitsSummary(
        source=data.source,
        data=data.folder,
        network=SIZES,
        seed=seed,
        num_fit=len(data.fit),
        num_choice=len(data.choice),
        num_test=len(data.test),
        digit=chosen,
        asked=digit is not None,
        choice_counts=tuple(data.choice.num_of_each()),
        choice_errors=measured(on_choice, data.choice).errors,
        recipe=RECIPE,
        before=measured(before, data.test),
        disabled=measured(disabled, data.test),
        adapters=adapters,
        num_added=counts.trained,
        num_base=counts.base,
        percent=counts.percent,
        claims=claims(handle, digest_before, before, disabled),
        digest=digest_before,
        seconds=time.monotonic() - started,
        version=__version__,
    )
    return handle, summary


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread.

    Batches this small gain nothing from more, and sums are then made in the same order on any number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def network(seed: int = 0) -> nn.Sequential:
    """Make the untrained network, 784-1000-2000-10: far larger than ten digits need."""
    d_in, d_1, d_2, d_out = SIZES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                linear1=nn.Linear(d_in, d_1),
                relu1=nn.ReLU(),
                linear2=nn.Linear(d_1, d_2),
                relu2=nn.ReLU(),
                linear3=nn.Linear(d_2, d_out),
            )
        )


def train(
    model: nn.Module, parameters: Iterable[nn.Parameter], batches: Iterable[tuple[Tensor, Tensor]], lr: float
) -> None:
    """Train ``parameters`` on batches of images and labels; whatever else the model has stays as it is."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def one_epoch(part: Part, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in random order."""
    inputs, chance = part.inputs, torch.Generator().manual_seed(seed)
    for rows in torch.split(torch.randperm(len(part), generator=chance), RECIPE.base_batch):
        yield inputs[rows], part.labels[rows]


def batches_of(part: Part, digit: int, num_others: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of ten images of ``digit``, the same ones for one seed, with ``num_others`` of other digits."""
    inputs = part.inputs
    own, others = (part.labels == digit).nonzero()[:, 0], (part.labels != digit).nonzero()[:, 0]
    chance_own, chance_others = (torch.Generator().manual_seed(seed) for _ in range(2))
    for _ in range(RECIPE.num_batches):
        picked = own[torch.randint(len(own), (RECIPE.num_own,), generator=chance_own)]
        replayed = others[torch.randint(len(others), (num_others,), generator=chance_others)]
        rows = torch.cat([picked, replayed])
        yield inputs[rows], part.labels[rows]


@torch.no_grad()
def logits_of(model: nn.Module, part: Part) -> Tensor:
    """Return the network's answers, ``[n, 10]``."""
    logits: Tensor = model(part.inputs)
    return logits


def measured(logits: Tensor, part: Part) -> Measured:
    """Count which digit was taken for which."""
    cells = torch.bincount(part.labels * NUM_DIGITS + logits.argmax(1), minlength=NUM_DIGITS**2)
    return Measured.of(tuple(tuple(row) for row in cells.view(NUM_DIGITS, NUM_DIGITS).tolist()))


def worst_digit(logits: Tensor, part: Part) -> int:
    """Return the digit with the largest share of errors; among equals the one with the largest mean loss."""
    losses = F.cross_entropy(logits, part.labels, reduction="none")
    errors, counts = measured(logits, part).errors, part.num_of_each()
    return max(range(NUM_DIGITS), key=lambda d: (errors[d] / counts[d], float(losses[part.labels == d].mean())))


def adapted(handle: Handle, name: str, before: Tensor, test: Part) -> Adapted:
    """Measure the network with one adapter, and describe what that adapter adds."""
    with handle.using(name):
        after = logits_of(handle.model, test)
    repaired, broken = changed(before, after, test)
    layers = layer_updates(handle.model, handle.state(name))
    return Adapted(name, measured(after, test), repaired, broken, layers)
