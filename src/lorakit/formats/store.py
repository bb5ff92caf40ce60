"""Adapters on disk: saved whole or not at all, loaded onto the base they belong to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters import AdapterState, Handle, SiteState, handle_of
from lorakit.adapters.capture import places
from lorakit.adapters.identity import compare, identify
from lorakit.adapters.walk import walk_parameters
from lorakit.bases.vocabulary import grow, num_tokens, table_paths
from lorakit.errors import (
    BaseMismatchError,
    FormatError,
    ModelError,
    RunFolderError,
    ShapeError,
    TargetError,
    UnsupportedLayerError,
    bullet_list,
    quoted,
)
from lorakit.files import atomic_write
from lorakit.formats.format import find_format
from lorakit.formats.peft import PeftFormat
from lorakit.formats.tensors import TensorFile, write_tensors

_LOG = logging.getLogger("lorakit")


def save_adapter(
    handle: Handle,
    folder: str | Path,
    adapter: str | None = None,
    *,
    base_name: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> list[Path]:
    """Save an adapter as a PEFT folder and return the files written.

    Args:
        handle: the model's handle.
        folder: where to; made if it is missing.
        adapter: which adapter; may be left out where only one can be meant.
        base_name: the base's name or folder, for whoever loads the adapter.
        revision: the base's pinned revision.
        task_type: PEFT's word for the task ('SEQ_CLS', 'CAUSAL_LM', 'SEQ_2_SEQ_LM').
        dtype: save floating-point tensors rounded to this dtype; None keeps theirs.
        force: replace an adapter that is there already.

    Raises:
        RunFolderError: the folder holds an adapter and ``force`` is not set.
        FormatError: PEFT's format cannot hold this adapter.
        TrainingError: the disk is full; whatever was there before is still whole.
    """
    state = handle.state(adapter)
    if base_name is not None:
        state = dataclasses.replace(state, base_name=base_name)
    if dtype is not None:
        state = rounded(state, dtype)
    return write_adapter(state, folder, PeftFormat(task_type, revision), force=force)


def write_adapter(
    state: AdapterState, folder: str | Path, format: PeftFormat | None = None, *, force: bool = False
) -> list[Path]:
    """Write an adapter's plain data as a PEFT folder, see :func:`save_adapter`."""
    folder, format = Path(folder), format or PeftFormat()
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"'{folder}' is a file; an adapter is saved as a folder. Choose another place.")
    files = format.encode(state)
    if not force and folder.is_dir() and format.recognises(folder):
        raise RunFolderError(f"'{folder}' holds an adapter already. Choose another folder, or replace it with force.")
    # Every file is whole beside its place before the first one is renamed.
    with contextlib.ExitStack() as renames:
        for name, content in files.items():
            temporary = renames.enter_context(atomic_write(folder / name))
            if isinstance(content, TensorFile):
                write_tensors(temporary, content)
            else:
                temporary.write_text(content, encoding="utf-8")
    return [folder / name for name in files]


def rounded(state: AdapterState, dtype: torch.dtype) -> AdapterState:
    """Return the state with its floating-point tensors rounded to ``dtype``."""

    def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    return dataclasses.replace(
        state,
        sites={p: dataclasses.replace(s, tensors=cast(s.tensors)) for p, s in state.sites.items()},
        rows={p: dataclasses.replace(s, tensors=cast(s.tensors)) for p, s in state.rows.items()},
        biases=cast(state.biases),
        modules={path: cast(tensors) for path, tensors in state.modules.items()},
        parts={name: cast(tensors) for name, tensors in state.parts.items()},
        shared=cast(state.shared),
    )


def read_adapter(folder: str | Path) -> AdapterState:
    """Read a saved adapter as plain data, without a model.

    Raises:
        FormatError: there is none, or it is broken, unsafe or uses what is not supported.
    """
    state, base_weights = _read(Path(folder), None)
    if base_weights:
        left_out = quoted(sorted(base_weights), 3)
        _LOG.info("'%s' also holds weights of its base (%s); they are left out.", folder, left_out)
    return state


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    check_base: bool = True,
    trainable: bool = False,
    device: str | torch.device | None = None,
) -> Handle:
    """Load a saved adapter onto ``model`` (changed in place), make it act, and return the handle.

    A file that does not say which base it belongs to is 'unverified'; the logger ``lorakit`` says so. A transformers
    model that has fewer tokens than the adapter trained rows of gets more first, which the logger says too.

    Args:
        model: the base, with or without other adapters.
        folder: the adapter's folder.
        name: how to call it here.
        check_base: check that the model is the base that the file says.
        trainable: let its parameters require gradients.
        device: where the file is read to; the adapter ends on its layers' devices.

    Raises:
        FormatError: see :func:`read_adapter`; or it holds base weights that are not this model's.
        BaseMismatchError: the adapter belongs to another base.
        TargetError, ShapeError: its layers are not in this model, or are of another size.
    """
    folder = Path(folder)
    state, base_weights = _read(folder, device)
    if check_base:
        _check_base(model, state, folder)
    _make_room(model, state)
    _check_kernels(model, state, folder)
    _check_base_weights(model, base_weights, state.rows, folder)
    existing = handle_of(model)
    handle = existing if existing is not None else Handle(model)
    try:
        handle.add_state(state, name, trainable=trainable)
    except BaseException as error:
        if existing is None:
            handle.detach()
        if isinstance(error, (TargetError, ShapeError, UnsupportedLayerError)):
            raise type(error)(f"adapter '{folder}' does not fit this {type(model).__name__}: {error}") from error
        raise
    return handle


def _read(folder: Path, device: str | torch.device | None) -> tuple[AdapterState, Mapping[str, Tensor]]:
    found = find_format(folder)
    files = found.read(folder, device)
    try:
        return found.decode(files), found.base_weights(files)
    except FormatError as error:
        raise FormatError(f"adapter '{folder}': {error}") from error


def _check_base(model: nn.Module, state: AdapterState, folder: Path) -> None:
    if state.identity is None:
        _LOG.warning("adapter '%s' does not say which base it belongs to: unverified.", folder)
        return
    mismatch = compare(state.identity, model)
    if mismatch is None:
        return
    here = identify(model, state.identity.excluded).short
    named = f"'{state.base_name}' " if state.base_name else ""
    layers = _misfits(model, state) if mismatch.kind == "structure" else ""
    raise BaseMismatchError(
        f"adapter '{folder}' belongs to the base {named}({state.identity.short}); this {type(model).__name__} "
        f"is {here}: {mismatch}. {layers}Load that base, or pass check_base=False if you know better."
    )


def _make_room(model: nn.Module, state: AdapterState) -> None:
    """Give a base as many tokens as the adapter's own rows, or its own copy of the embedding, need.

    Raises:
        ShapeError: other adapters are on it already.
    """
    if not (state.rows or state.modules):
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    last = max((stop for site in state.rows.values() for _, stop in site.runs or ()), default=0)
    try:
        here, table = num_tokens(model), table_paths(model)[0]
    except ModelError:  # it has no embedding of tokens: nothing of the adapter is one
        return
    copied = state.modules.get(table, {}).get("weight")
    wanted = max(last, 0 if copied is None else copied.shape[0])
    if wanted > here and handle_of(model) is not None:
        raise ShapeError(
            f"the adapter needs {wanted:,} tokens and the model has {here:,}, which cannot become more while other "
            "adapters are on it. Load this one before the others."
        )
    if wanted > here:
        grow(model, range(here, wanted))
        _LOG.info("the model had %s tokens, the adapter needs %s: rows added.", f"{here:,}", f"{wanted:,}")


def _misfits(model: nn.Module, state: AdapterState) -> str:
    """Say which of the adapter's own layers do not fit the model, such as an embedding of fewer tokens."""
    try:
        places(model, state)
    except (TargetError, ShapeError, UnsupportedLayerError) as error:
        return f"Of its own layers: {error}. "
    return ""


def _check_kernels(model: nn.Module, state: AdapterState, folder: Path) -> None:
    """Refuse convolutions of another kernel: as matrices, 1 x 4 and 2 x 2 would be the same size."""
    convolutions = {path: site for path, site in state.sites.items() if site.kind.startswith("conv")}
    if not convolutions:
        return
    shapes = {name: tuple(parameter.shape) for name, parameter in walk_parameters(model, remove_duplicate=False)}
    problems = [
        f"'{path}' has a weight {shapes[f'{path}.weight']} here, {site.weight_shape} in the adapter"
        for path, site in convolutions.items()
        if shapes.get(f"{path}.weight", site.weight_shape) != site.weight_shape
    ]
    if problems:
        raise ShapeError(f"adapter '{folder}' does not fit this {type(model).__name__}: {bullet_list(problems)}.")


def _check_base_weights(
    model: nn.Module, weights: Mapping[str, Tensor], rows: Mapping[str, SiteState], folder: Path
) -> None:
    """Accept copies of the base's own weights beside an adapter only where they are this model's, but for its rows."""
    if not weights:
        return
    own = dict(walk_parameters(model, remove_duplicate=False))
    trained: dict[int, list[int]] = {}
    for path, site in rows.items():
        table = own.get(f"{path.partition('[')[0]}.weight")
        trained.setdefault(id(table), []).extend(i for run in site.runs or () for i in range(*run))
    problems = []
    for name, saved in weights.items():
        here = own.get(name)
        if here is None or here.shape != saved.shape:
            found = "missing" if here is None else f"{tuple(here.shape)}"
            problems.append(f"'{name}' is {tuple(saved.shape)} there, {found} here")
            continue
        same = here.detach().cpu().to(saved.dtype) == saved.cpu()
        same[trained.get(id(here), [])] = True
        if not bool(same.all()):
            problems.append(f"'{name}' has other values")
    if problems:
        raise FormatError(
            f"adapter '{folder}' holds weights of its base that are not this model's: {bullet_list(problems)}. "
            "Load the base that it was trained on (with its resized vocabulary)."
        )
