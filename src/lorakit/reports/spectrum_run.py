"""A saved adapter -> what is inside its updates: against its base's weights, and against another adapter's.

Without a base only the adapter's file is read. With one, its weights are read one at a time from its files; the
model is built only where the files do not say which weight belongs to which layer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.adapters.spectrum import Pair, layer_spectra, low_rank_pair, low_rank_updates, similarities
from lorakit.bases.source import check_folder, local_folder
from lorakit.bases.weights import open_weights
from lorakit.errors import InputError, ModelError, ShapeError, bullet_list, quoted
from lorakit.formats.store import read_adapter
from lorakit.records import AdapterSimilarity, AdapterSpectrum, LayerSimilarity, LayerSpectrum
from lorakit.training.config import read_config
from lorakit.training.runs import check_adapter_folder, open_run

Stage = Callable[[str], None]
_SAID_EVERY_S = 5.0
_WORTH_THREADS = 2048 * 2048
_GIVE_BASE = "Give it with --base MODEL for sizes relative to the base weights and the shares inside their directions."


@dataclass(frozen=True)
class _Layer:
    """One layer's factors, and how to get its base weight as a matrix, if there is one."""

    path: str
    pair: Pair
    weight: Callable[[], Tensor] | None = None


def read_spectrum(
    run: str | Path,
    other: str | Path | None = None,
    base: str | None = None,
    *,
    use_base: bool = True,
    trust_remote_code: bool = False,
    stage: Stage = lambda text: None,
) -> AdapterSpectrum:
    """Look inside the updates of a saved adapter.

    Args:
        run: a run folder, or a bare PEFT folder.
        other: another one to compare with, layer by layer.
        base: the base's folder or hub name; else the one that the adapter names. One that is not on this machine
            is downloaded only where it is named here.
        use_base: read the base's weights; else, and where they are out of reach, what needs them is left out.
        trust_remote_code: let code of the model's repository run, where the model has to be built.
        stage: told what is being done.

    Raises:
        RunFolderError, FormatError: a folder is missing, or has no adapter that can be read.
        BaseMismatchError: the weights found are not those that the adapter was trained on.
        ModelError: the base that was named cannot be had.
        ShapeError: the adapters' updates of a layer are of different sizes; every such layer is named.
        InputError: the adapter has no low-rank update, or shares no layer with the other one.
    """
    folder = Path(run).expanduser()
    stage("reading the adapter")
    state = _read(folder)
    against = Path(other).expanduser() if other is not None else None
    compared = _read(against) if against is not None else None
    similarity = None
    if against is not None and compared is not None:
        with _threads(1):
            similarity = _similarity(folder, _pairs(folder, state), against, compared)
    layers, named, missing = _layers(folder, state, base, use_base, trust_remote_code, stage)
    found: list[LayerSpectrum] = []
    said = time.monotonic()
    for number, layer in enumerate(layers):
        if time.monotonic() - said > _SAID_EVERY_S:
            stage(f"layer {number:,} of {len(layers):,}")
            said = time.monotonic()
        weight = layer.weight() if layer.weight is not None else None
        with _threads(1 if weight is None or weight.numel() < _WORTH_THREADS else None):
            found += layer_spectra(layer.path, layer.pair, weight, overlap=weight is not None)
    return AdapterSpectrum(
        folder=str(folder),
        method=state.method.summary(),
        layers=tuple(found),
        base=named,
        base_missing=missing,
        similarity=similarity,
        notes=tuple(_notes(state, compared, read=named is not None)),
    )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within the block let torch use ``count`` threads; None leaves it as it is.

    Small products and decompositions gain nothing from threads, and lose much where another process holds a core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(folder: Path) -> AdapterState:
    check_adapter_folder(folder)
    state = read_adapter(folder)
    if not any({"A", "d"} & site.tensors.keys() for site in state.sites.values()):
        raise InputError(f"'{folder}' has no low-rank update to look into: it trains {_contents(state)}.")
    return state


def _contents(state: AdapterState) -> str:
    return f"modules in full ({quoted(sorted(state.modules), 3)})" if state.modules else "no layer's matrix"


def _pairs(folder: Path, state: AdapterState) -> dict[str, Pair]:
    """Return the factors by layer path, from the adapter's tensors alone."""
    found = {path: low_rank_pair(state.method, path, site, shared=state.shared) for path, site in state.sites.items()}
    known = {path: pair for path, pair in found.items() if pair is not None}
    if len(known) < len(found):
        raise InputError(
            f"what the updates of '{folder}' are does not follow from its tensors alone (method "
            f"'{state.method.name}'): its base is needed, and a comparison is not possible. Give --base MODEL."
        )
    return known


def _layers(
    folder: Path, state: AdapterState, base: str | None, use_base: bool, trust: bool, stage: Stage
) -> tuple[list[_Layer], str | None, str | None]:
    """Return the layers, the base that is read, and why none is."""
    if not use_base:
        return _bare(folder, state), None, "The base was not read, as asked: no figure that needs its weights."
    name = base or state.base_name
    if name is None:
        return _bare(folder, state), None, f"The adapter does not say which base it belongs to. {_GIVE_BASE}"
    place, missing = _place(folder, name, named=base is not None)
    if missing is not None:
        return _bare(folder, state), None, missing
    if place is not None:
        check_folder(place)
        weights = open_weights(place, state)
        if weights is not None:
            found = [_Layer(x.path, x.pair, _reader(weights.matrix, x.path)) for x in _bare(folder, state)]
            return found, name, None
    open_names = ": its files alone do not say which weight belongs to which layer" if place is not None else ""
    stage(f"loading the base{open_names}")
    opened = open_run(folder, base, device="cpu", trust_remote_code=trust)
    live = low_rank_updates(opened.handle)
    return [_Layer(path, pair, site.matrix) for path, site, pair in live], name, None


def _bare(folder: Path, state: AdapterState) -> list[_Layer]:
    return [_Layer(path, pair) for path, pair in _pairs(folder, state).items()]


def _reader(read: Callable[[str], Tensor], path: str) -> Callable[[], Tensor]:
    return lambda: read(path)


def _place(folder: Path, name: str, *, named: bool) -> tuple[Path | None, str | None]:
    """Return the base's folder if it has one here, or else why it is out of reach.

    A base that the user named is never out of reach: loading it says what is wrong.
    """
    try:
        place = local_folder(name)
    except ModelError:
        if named:
            raise
        return None, f"The base '{name}' is not there any more. {_GIVE_BASE}"
    place = place or _cached(folder, name)
    if place is None and not named:
        return None, f"The base '{name}' is not on this machine. {_GIVE_BASE}"
    return place, None


def _cached(folder: Path, name: str) -> Path | None:
    """Return the folder of a hub model in the cache, at the run's revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    config = folder / "config.yaml"
    revision = read_config(config).get("revision") if config.is_file() else None
    try:
        place = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return place if any(place.glob("*.safetensors")) else None


def _similarity(folder: Path, here: Mapping[str, Pair], other: Path, state: AdapterState) -> AdapterSimilarity:
    there = _pairs(other, state)
    shared = [path for path in here if path in there]
    if not shared:
        raise InputError(
            f"'{folder}' and '{other}' share no layer: the first updates {quoted(list(here), 3)}, the second "
            f"{quoted(list(there), 3)}. Compare adapters of the same architecture and targets."
        )
    layers: list[LayerSimilarity] = []
    problems = []
    for path in shared:
        try:
            layers += similarities(path, here[path], there[path])
        except ShapeError as error:
            problems.append(str(error))
    if problems:
        raise ShapeError(f"'{folder}' and '{other}' cannot be compared: {bullet_list(problems)}.")
    return AdapterSimilarity(
        other=str(other),
        method=state.method.summary(),
        layers=tuple(layers),
        only_here=tuple(path for path in here if path not in there),
        only_there=tuple(path for path in there if path not in here),
    )


def _notes(state: AdapterState, other: AdapterState | None, *, read: bool) -> Iterator[str]:
    if read and state.identity is None:
        yield "The adapter's file does not say which base it belongs to: that these are its weights is unverified."
    for one in (state, other) if other is not None else (state,):
        beside = sorted({name for site in one.sites.values() for name in site.tensors} - {"A", "B", "d", "b"})
        if beside:
            which = "The other adapter's" if one is other else "The"
            yield (
                f"{which} method '{one.method.name}' also learns {quoted(beside)}: shown is its low-rank part, "
                "scale * B A."
            )
    first, second = state.identity, other.identity if other is not None else None
    if first is not None and second is not None and first.excluded == second.excluded and first.short != second.short:
        yield f"The two adapters belong to different bases ({first.short} and {second.short})."
