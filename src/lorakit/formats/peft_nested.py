"""Modules whose several weights PEFT wraps one inside the other: attention, and parameters adapted by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorakit.errors import quoted
from lorakit.formats.peft_config import matches, names_in
from lorakit.formats.peft_layers import Reading, Spelling, Written
from lorakit.formats.peft_notes import Note
from lorakit.formats.peft_parts import Weight
from lorakit.methods.lora import LoRA

# How transformers' mixtures of experts register their stacks: PEFT wraps parameters in the order of their module.
_ORDER = ("gate_proj", "gate_up_proj", "up_proj", "down_proj")

_LAST_TO_DOUBLE = "0.21.2"

_LOG = logging.getLogger("lorakit")


class AttentionSpelling(Spelling):
    """``nn.MultiheadAttention`` with one input projection, which PEFT adapts together with ``out_proj``.

    PEFT up to 0.21.2 adds the update of ``out_proj`` twice (its pull request 3774), in every forward and in every
    merge. So its files are read with twice that B, which is what they compute, and an update of ``out_proj``
    is not written for PEFT at all: in one version or another it would be another one.
    """

    kinds = frozenset({"attention"})

    def write(self, module: str, weights: Sequence[Weight], method: LoRA) -> Written | None:
        """See :class:`Spelling`; ``out_proj`` gets a pair of zeros."""
        weight = weights[0]
        if [weight.path for weight in weights] != [f"{module}.in_proj_weight"] or "magnitude" in weight.tensors:
            return None
        A, B, inner = weight.tensors["A"], weight.tensors["B"], f"{module}.out_proj"
        written = Written(wraps={module: 1, inner: 1}, modules=[module], notes=weight.notes())
        for place, pair in ((module, (A, B)), (inner, (torch.zeros_like(A), B.new_zeros(A.shape[1], A.shape[0])))):
            written.put(place, 0, dict(zip((method.peft_tensors["A"], method.peft_tensors["B"]), pair, strict=True)))
        written.name(module, weight)
        return written

    def read(self, reading: Reading) -> None:
        """See :class:`Spelling`; where the notes name the input projection, it alone is adapted."""
        for module in [module for module, depth in reading.left() if depth == 0]:
            inner = f"{module}.out_proj"
            both = {(module, 0), (inner, 0)} <= reading.found.updates.keys()
            if not both or module not in reading.found.wrapped or _holds_parameters(reading, module):
                continue
            _read_projection(reading, module, f"{module}.in_proj_weight", module, 3)
            _read_projection(reading, module, inner, inner, 1)


def _read_projection(reading: Reading, module: str, path: str, place: str, rows: int) -> None:
    tensors = reading.take(path, place)
    if tensors is None:
        return
    A, B = tensors["A"], tensors["B"]
    if (A.dim(), tuple(B.shape)) != (2, (rows * A.shape[-1], A.shape[0])):
        shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
        reading.problems.append(f"'{path}': {shapes} are no update of an attention's projection")
        return
    if place != module and f"{module}.in_proj_weight" in reading.notes.by_weight:
        if bool(A.any()) or bool(B.any()):
            reading.problems.append(f"'{path}' has numbers, but the file says that it is not adapted")
        return
    if place != module and bool(B.any()):
        version = str(reading.config.get("peft_version") or "")
        if _later(version, _LAST_TO_DOUBLE):
            reading.problems.append(
                f"'{path}' was trained with PEFT {version}, and whether that adds its update twice, as PEFT does up "
                f"to {_LAST_TO_DOUBLE}, is not known here: merge the adapter with that PEFT"
            )
            return
        _LOG.warning("'%s': PEFT up to %s adds this update twice; it is read so.", path, _LAST_TO_DOUBLE)
        tensors = {**tensors, "B": 2 * B}
    weight = Weight(path, "attention", tuple(B.shape[:1] + A.shape[1:]), tensors, reading.shares(path, A.shape[0]))
    reading.put(module, weight)


def _later(version: str, other: str) -> bool:
    """Tell whether a version's numbers are above another's; one without numbers is not."""
    numbers = [tuple(int(number) for number in re.findall(r"\d+", text)[:3]) for text in (version, other)]
    return numbers[0] > numbers[1]


class ParameterSpelling(Spelling):
    """Parameters by name (PEFT's ``target_parameters``), matrices or stacks of ``E`` of them.

    A[E, rank, d_in] is written as [E * rank, d_in], B[E, d_out, rank] as [d_out, rank * E]: experts outside in
    A's rows, inside in B's columns. The key has no name: a module's first parameter is wrapped first and stands
    innermost.
    """

    kinds = frozenset({"experts", "parameter"})

    def write(self, module: str, weights: Sequence[Weight], method: LoRA) -> Written | None:
        """See :class:`Spelling`; PEFT heeds a transposed storage in stacks of several matrices only."""
        single = [weight for weight in weights if weight.tensors["A"].dim() == 2 or weight.tensors["A"].shape[0] == 1]
        if any("magnitude" in weight.tensors for weight in weights) or any(w.options for w in single):
            return None
        written = Written(wraps={module: len(weights)}, parameters=[weight.path for weight in weights])
        for depth, weight in zip(reversed(range(len(weights))), weights, strict=True):
            A, B = weight.tensors["A"], weight.tensors["B"]
            if A.dim() == 3:
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
            written.put(module, depth, {method.peft_tensors["A"]: A, method.peft_tensors["B"]: B})
            written.name(weight.path, weight)
            written.notes.update(weight.notes())
        return written

    def read(self, reading: Reading) -> None:
        """See :class:`Spelling`; names are those of our notes, else those that the config allows."""
        targets = target_parameters(reading)
        unused = set(targets)
        depths: dict[str, int] = {}
        for module, depth in reading.left():
            depths[module] = max(depths.get(module, 0), depth)
        for module, depth in depths.items():
            names = _noted(reading, module) or _named(reading, module, depth + 1, targets)
            if names is None:
                unused = {target for target in unused if not _may_be_in(target, module)}
                for taken in range(depth + 1):
                    reading.found.updates.pop((module, taken), None)
                continue
            unused -= {target for target in targets for name in names if matches(target, f"{module}.{name}")}
            for i, name in enumerate(names):
                _read_parameter(reading, module, name, len(names) - 1 - i)
        if unused:
            reading.problems.append(
                f"the config's 'target_parameters' name {quoted(sorted(unused))}, of which the file has nothing: "
                "take them out of adapter_config.json if they were never adapted"
            )


def _read_parameter(reading: Reading, module: str, name: str, depth: int) -> None:
    path = f"{module}.{name}"
    tensors = reading.take(path, module, depth)
    if tensors is None:
        return
    A, B = tensors["A"], tensors["B"]
    rank = reading.method.rank_at(path)
    shapes = f"'{path}': A {tuple(A.shape)} with B {tuple(B.shape)}"
    if (A.dim(), B.dim()) != (2, 2) or A.shape[0] != B.shape[1]:
        reading.problems.append(f"{shapes} is no update of a parameter")
        return
    if A.shape[0] % rank:
        reading.problems.append(f"{shapes} has {A.shape[0]} ranks of all experts, the config says {rank} for each")
        return
    num_experts = A.shape[0] // rank
    noted = reading.notes.by_weight.get(path, {})
    note = next(iter(noted.values()), None)
    stacked = num_experts > 1
    if note is None:
        note = Note("experts" if stacked else "parameter", tuple(B.shape[:1] + A.shape[1:]), rank)
    else:
        stacked = len(note.shape) == 3
    if stacked:
        A = A.reshape(num_experts, rank, -1)
        B = B.reshape(-1, rank, num_experts).permute(2, 0, 1).contiguous()
    weight = Weight(path, note.kind, note.shape, {"A": A, "B": B}, reading.shares(path, rank), note.options)
    reading.put(path, weight)


def target_parameters(reading: Reading) -> list[str]:
    """Return the config's ``target_parameters``."""
    return names_in(reading.config, "target_parameters") or []


def _may_be_in(target: str, module: str) -> bool:
    """Tell whether a target parameter, with or without its module, can be one of this module's."""
    holder, _, _ = target.rpartition(".")
    return not holder or matches(holder, module)


def _holds_parameters(reading: Reading, module: str) -> bool:
    """Tell whether what looks like an attention is a module with an adapted parameter and a child 'out_proj'."""
    named = any(_may_be_in(target, module) for target in target_parameters(reading))
    return bool(_noted(reading, module)) or (named and not _is_target(reading.config, module))


def _noted(reading: Reading, module: str) -> list[str]:
    """Return the names of a module's parameters as our own notes have them, in order."""
    return [
        path.removeprefix(f"{module}.")
        for path, notes in reading.notes.by_weight.items()
        if path.rpartition(".")[0] == module and next(iter(notes.values())).kind in ParameterSpelling.kinds
    ]


def _named(reading: Reading, module: str, count: int, targets: Sequence[str]) -> list[str] | None:
    """Return the names of the ``count`` parameters that the config means in a module, in PEFT's order.

    There are none in a module that the config names as a whole. None itself, and a problem, where the names are
    not as many as the updates or their order is not known.
    """
    inside = [target for target in targets if _may_be_in(target, module)]
    exact = {target.rpartition(".")[2] for target in inside if "." in target}
    loose = {target for target in inside if "." not in target}
    names = sorted(exact if len(exact) == count else exact | loose)
    if not names or (count == 1 and _is_target(reading.config, module)):
        return []
    if len(names) == 1 and count == 1:
        return names
    if len(names) == count and set(names) <= set(_ORDER):
        return sorted(names, key=_ORDER.index)
    reason = (
        f"the config's 'target_parameters' allow {quoted(names)}: name exactly those that were adapted, with their "
        "module"
        if len(names) != count
        else f"which of {quoted(names)} is which is not in the file: PEFT orders them as the module's class does. Let "
        "PEFT save each in an adapter of its own"
    )
    reading.problems.append(f"'{module}' has {count} update{'s' * (count > 1)} of its parameters, and {reason}")
    return None


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Tell whether the config's target modules mean a module."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(matches(name, module) for name in names_in(config, "target_modules") or [])
