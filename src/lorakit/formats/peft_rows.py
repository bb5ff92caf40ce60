"""Rows of tokens that are trained whole, in PEFT's spelling and back.

adapter_config.json     "trainable_token_indices": {"model.embed_tokens": [32000, 32001]}, or a list for the input
                        embedding alone
the tensors             M.token_adapter.trainable_tokens_delta    [n, width]: the rows, whatever its name says

A head that is tied to the embedding follows it there as it does here, and is not in the file. PEFT drops the bias of
a head whose rows it trains, and has no rows beside an update of the same module: such adapters it must not load.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import AdapterState, SiteState
from lorakit.formats.peft_keys import Sorted, base_key
from lorakit.formats.peft_notes import Note
from lorakit.layers.ops import Runs, num_rows
from lorakit.layers.site import PART, spelled

FIELD = "trainable_token_indices"
WORD = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class WrittenRows:
    """What is written of an adapter's rows.

    Attributes:
        indices: the config's field: numbers of the rows by module.
        tensors: by key.
        notes: by path.
        refused: PEFT computes something else and must be kept from loading it.
    """

    indices: dict[str, list[int]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    refused: bool = False


def write_rows(state: AdapterState) -> WrittenRows:
    """Return an adapter's rows as PEFT has them: one tensor for each module, its rows in rising order."""
    modules: dict[str, dict[str, SiteState]] = {}
    for path, site in state.rows.items():
        modules.setdefault(_module(path), {})[path] = site
    updated = {_module(path) for path in state.sites}
    written = WrittenRows(refused=any(site.options for site in state.rows.values()) or bool(updated & modules.keys()))
    for module, sites in modules.items():
        numbers = torch.cat([_numbers(site.runs or ()) for site in sites.values()])
        order = numbers.argsort()
        written.indices[module] = numbers[order].tolist()
        rows = torch.cat([site.tensors["rows"] for site in sites.values()])
        written.tensors[base_key(f"{module}.{WORD}", {})] = rows[order] if len(sites) > 1 else rows
        for path, site in sites.items():
            written.notes[path] = Note(site.kind, site.weight_shape, num_rows(site.runs or ()), site.runs, site.options)
    return written


def read_rows(
    found: Sorted, config: Mapping[str, Any], notes: Mapping[str, Note]
) -> tuple[dict[str, SiteState], list[str]]:
    """Take all rows out of a file; return them by path, and what speaks against the file."""
    rows: dict[str, SiteState] = {}
    problems: list[str] = []
    stated = config.get(FIELD)
    used: set[str] = set()
    for key in [key for key in found.plain if f".{WORD}" in key]:
        tensor, module = found.plain.pop(key), key.partition(f".{WORD}")[0]
        name = "" if isinstance(stated, list) else _named(stated, module)
        numbers = stated if isinstance(stated, list) else (stated or {}).get(name)
        if numbers is None or not _are_rows(numbers, tensor):
            problems.append(f"'{module}' has rows {list(tensor.shape)}, the config's '{FIELD}' does not say of which")
            continue
        used.add(name)
        noted = {path: note for path, note in notes.items() if _module(path) == module}
        rows |= _sites(module, [int(number) for number in numbers], tensor, noted, problems)
    if isinstance(stated, dict):
        present = [sorted(stated[name]) for name in used]
        left = [name for name in stated if name not in used and sorted(stated[name]) not in present]
        problems += [f"the rows of '{name}', which the config's '{FIELD}' names, are missing" for name in left]
    elif stated and not rows and not problems:
        problems.append(f"the rows that the config's '{FIELD}' names are missing")
    return rows, problems


def _sites(
    module: str, numbers: list[int], tensor: Tensor, noted: Mapping[str, Note], problems: list[str]
) -> dict[str, SiteState]:
    """Return one module's rows: as the notes part them, else as one site."""
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    ordered = sorted(numbers)
    rows = tensor if order == list(range(len(order))) else tensor[order]
    if not noted:
        runs = _runs(ordered)
        shape = ordered[-1] + 1, int(tensor.shape[1])
        return {f"{module}[{spelled(runs)}]": SiteState("embedding", shape, {"rows": rows}, runs)}
    own = {path: _numbers(note.runs or ()).tolist() for path, note in noted.items()}
    if sorted(itertools.chain.from_iterable(own.values())) != ordered:
        problems.append(f"'{module}': the file's own notes name other rows than the config's '{FIELD}'")
        return {}
    place = {number: i for i, number in enumerate(ordered)}
    return {
        path: SiteState(
            note.kind, note.shape, {"rows": rows[[place[i] for i in own[path]]]}, note.runs, dict(note.options)
        )
        for path, note in noted.items()
    }


def _are_rows(numbers: Any, tensor: Tensor) -> bool:
    if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        return False
    return tensor.dim() == 2 and len(set(numbers)) == len(numbers) == tensor.shape[0]


def _named(stated: Any, module: str) -> str:
    """Return the name in PEFT's mapping that means a module: its path, or the end of it."""
    names = stated if isinstance(stated, dict) else {}
    return next((name for name in names if module == name or module.endswith(f".{name}")), "")


def _module(path: str) -> str:
    part = PART.fullmatch(path)
    return path if part is None else part["path"]


def _numbers(runs: Runs) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _runs(numbers: list[int]) -> Runs:
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return tuple(found)
