"""How each kind of layer is spelled in PEFT's files: one :class:`Spelling` for every form that PEFT has.

What PEFT cannot compute (it has no such layer, or no such update of it) is kept in a form of our own: the
tensors as they are, under the site's own path, and a note that says what they are. PEFT refuses such a
folder, see :data:`lorakit.formats.peft_config.OWN_TYPE`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lorakit.adapters import SiteState
from lorakit.formats.peft_keys import Address, Sorted
from lorakit.formats.peft_notes import Note, Notes
from lorakit.formats.peft_parts import Key, Share, Weight
from lorakit.methods.lora import LoRA

# Kinds that no class of PEFT's covers: with their module as a target it says so itself.
_UNKNOWN_TO_PEFT = frozenset(
    {"recurrent", "recurrent_cell", "bilinear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)


@dataclass
class Written:
    """What is written of an adapter's updates.

    Attributes:
        updates: tensors by address.
        wraps: number of PEFT's wrappers around every adapted module.
        modules: PEFT's target modules; ``parameters`` its target parameters.
        keys: by PEFT's path.
        notes: by site, in the order of the state.
        transposed: layers whose weight is stored as ``[d_in, d_out]``; ``linear`` whether there are others.
        refused: PEFT has these layers but no such update, and must be kept from loading it.
    """

    updates: dict[Address, Tensor] = field(default_factory=dict)
    wraps: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    keys: dict[str, Key] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)
    linear: bool = False
    refused: bool = False

    def put(self, module: str, depth: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of one update by PEFT's words."""
        self.updates.update({Address(module, depth, word): tensor for word, tensor in tensors.items()})

    def name(self, path: str, weight: Weight) -> None:
        """Say where PEFT looks up this weight's rank and alpha."""
        self.keys[path] = weight.key()

    def add(self, other: Written) -> None:
        """Take in what was written of other layers."""
        self.updates.update(other.updates)
        self.wraps.update(other.wraps)
        self.keys.update(other.keys)
        self.notes.update(other.notes)
        self.modules += other.modules
        self.parameters += other.parameters
        self.transposed += other.transposed
        self.linear |= other.linear
        self.refused |= other.refused


@dataclass
class Reading:
    """A file's updates while they are read: every spelling takes out what is its own.

    Attributes:
        found: the file's tensors; what is read is taken out of it.
        config: the parsed config; ``method`` what it says.
        notes: the file's own notes.
        weights: what was read, each with the path at which the config's patterns say rank and alpha.
        sites: sites in our own form.
        problems: what speaks against the file.
    """

    found: Sorted
    config: Mapping[str, Any]
    method: LoRA
    notes: Notes
    weights: list[tuple[str, Weight]] = field(default_factory=list)
    sites: dict[str, SiteState] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take(self, path: str, module: str, depth: int = 0) -> dict[str, Tensor] | None:
        """Take the tensors of one update out of the file, by name; None and a problem where they are not whole.

        Args:
            path: whose update it is, for messages.
            module: where it stands.
            depth: how many of PEFT's wrappers further in.
        """
        found = self.found.updates.pop((module, depth), {})
        embedding = any("embedding" in word for word in found)
        words = {name: embedding_word(word) if embedding else word for name, word in self.method.peft_tensors.items()}
        problems = [f"'{path}' has no {word}" for word in words.values() if word not in found]
        extra = sorted(set(found) - set(words.values()))
        problems += [f"'{path}' has a {word}, which this method does not have" for word in extra]
        if not all(tensor.is_floating_point() for tensor in found.values()):
            problems.append(f"'{path}' has tensors that are not of a floating-point dtype")
        elif not all(bool(tensor.isfinite().all()) for tensor in found.values()):
            problems.append(f"'{path}' contains NaN or infinite values")
        self.problems += problems
        return None if problems else {name: found[word] for name, word in words.items()}

    def shares(self, path: str, rank: int) -> tuple[Share, ...]:
        """Return the sites of a weight: those that the notes name, else itself."""
        noted = self.notes.by_weight.get(path, {})
        return tuple(Share(site, note.rank, note.runs) for site, note in noted.items()) or (Share(path, rank),)

    def put(self, key: str, weight: Weight) -> None:
        """Add what was read."""
        self.weights.append((key, weight))

    def left(self) -> Iterator[tuple[str, int]]:
        """Yield module and depth of what nobody has taken yet."""
        yield from list(self.found.updates)


class Spelling(ABC):
    """How PEFT spells updates of some kinds of layer.

    Attributes:
        kinds: of our layers.
    """

    kinds: ClassVar[frozenset[str]]

    @abstractmethod
    def write(self, module: str, weights: Sequence[Weight], method: LoRA) -> Written | None:
        """Return the updates of one module's weights as PEFT has them, or None where it cannot compute them."""

    @abstractmethod
    def read(self, reading: Reading) -> None:
        """Take every update of this spelling out of a file."""


class PlainSpelling(Spelling):
    """Layers with one weight and a place of their own: matrices as they are, convolutions' as kernels."""

    kinds = frozenset({"linear", "transposed", "embedding", "scaled_embedding", "conv1d", "conv2d", "conv3d"})

    def write(self, module: str, weights: Sequence[Weight], method: LoRA) -> Written | None:
        """See :class:`Spelling`; PEFT convolves with A without the host's groups, dilation and padding mode."""
        (weight,), words = weights, method.peft_tensors
        if weight.options:
            return None
        written = Written(wraps={module: 1}, modules=[module], linear=weight.kind == "linear")
        spelled = {words[name]: tensor for name, tensor in weight.tensors.items() if name in words}
        if "embedding" in weight.kind:
            spelled = {embedding_word(word): tensor for word, tensor in spelled.items()}
        elif weight.kind.startswith("conv"):
            spelled = {word: _as_kernel(word, tensor, weight.shape) for word, tensor in spelled.items()}
        written.put(module, 0, spelled)
        written.name(module, weight)
        if weight.kind == "transposed":
            written.transposed.append(module)
        if weight.path != weight.shares[0].site:
            written.notes.update(weight.notes())
        return written

    def read(self, reading: Reading) -> None:
        """See :class:`Spelling`."""
        stated = reading.notes.transposed
        everywhere = bool(reading.config.get("fan_in_fan_out")) and stated is None
        for module, depth in reading.left():
            if depth:
                del reading.found.updates[module, depth]
                reading.problems.append(
                    f"'{module}' has an update inside its 'base_layer': of a parameter that the config's "
                    "'target_parameters' do not name"
                )
                continue
            embedding = any("embedding" in word for word in reading.found.updates[module, depth])
            tensors = reading.take(module, module)
            if tensors is not None:
                kind = "embedding" if embedding else "linear"
                if kind == "linear" and (everywhere or module in (stated or ())):
                    kind = "transposed"
                self._read(reading, module, kind, tensors)

    def _read(self, reading: Reading, path: str, kind: str, tensors: dict[str, Tensor]) -> None:
        A, B = tensors["A"], tensors["B"]
        problem = _misshapen(path, A, B)
        matrices = {"A": A.flatten(1), "B": B.flatten(1)} if problem is None else {}
        for name in tensors.keys() - {"A", "B"}:
            matrices[name] = tensors[name].flatten()
            if matrices[name].numel() != B.shape[0]:
                shape = tuple(tensors[name].shape)
                problem = f"'{path}': {reading.method.peft_tensors[name]} {shape} does not fit {B.shape[0]} outputs"
        if problem is not None:
            reading.problems.append(problem)
            return
        shape = B.shape[0], math.prod(A.shape[1:])
        if A.dim() > 2:
            kind, shape = f"conv{A.dim() - 2}d", (B.shape[0], *A.shape[1:])
        elif kind != "linear":
            shape = shape[::-1]
        shares = reading.shares(path, A.shape[0])
        note = reading.notes.layers.get(shares[0].site)
        if note is not None:
            kind, shape = note.kind, note.shape
        ordered = {name: matrices[name] for name in tensors}
        reading.put(path, Weight(path, kind, tuple(shape), ordered, shares))


class OwnForm:
    """Any site at all: its tensors as they are, under its own path."""

    def write(self, module: str, sites: Mapping[str, SiteState], method: LoRA) -> Written:
        """Return the sites of one module."""
        written = Written(modules=[module], refused=any(s.kind not in _UNKNOWN_TO_PEFT for s in sites.values()))
        for path, site in sites.items():
            rank = int(site.tensors["A"].shape[-2])
            written.put(path, 0, {method.peft_tensors[name]: t for name, t in site.tensors.items()})
            written.keys[path] = Key(rank, path, rank)
            written.notes[path] = Note(site.kind, site.weight_shape, rank, site.runs, site.options, own=True)
        return written

    def read(self, reading: Reading) -> None:
        """Take the sites that the notes name out of a file."""
        for path, note in reading.notes.layers.items():
            tensors = reading.take(path, path) if note.own else None
            if tensors is None:
                continue
            A, B = tensors["A"], tensors["B"]
            if (
                A.dim() not in (2, 3)
                or B.dim() != A.dim()
                or (A.shape[:-2], A.shape[-2]) != (B.shape[:-2], B.shape[-1])
            ):
                reading.problems.append(_disagree(path, A, B))
            else:
                reading.sites[path] = SiteState(note.kind, note.shape, tensors, note.runs, note.options)


def embedding_word(word: str) -> str:
    """Return PEFT's word for a tensor of an embedding."""
    return re.sub(r"^lora_([AB])$", r"lora_embedding_\1", word)


def _as_kernel(word: str, matrix: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    ones = (1,) * (len(weight_shape) - 2)
    if word == "lora_A":
        return matrix.reshape(matrix.shape[0], *weight_shape[1:])
    return matrix.reshape(*matrix.shape, *ones) if word == "lora_B" else matrix.reshape(1, -1, *ones)


def _misshapen(path: str, A: Tensor, B: Tensor) -> str | None:
    """Say what is wrong with the shapes of a pair, None where they are of a layer that is supported."""
    kernel = tuple(B.shape[2:])
    if A.dim() != B.dim() or A.dim() not in (2, 3, 4, 5) or set(kernel) > {1}:
        return f"'{path}': A {tuple(A.shape)} with B {tuple(B.shape)} is no kind of layer that is supported"
    if A.shape[0] == B.shape[1]:
        return None
    groups, rest = divmod(A.shape[0], B.shape[1])
    if kernel and not rest:
        return (
            f"'{path}': A {tuple(A.shape)} with B {tuple(B.shape)} is PEFT's update of a convolution with {groups} "
            "groups. It lets every output see the inputs of all groups, which no weight of that layer can (PEFT cannot "
            "merge it either). Train an adapter for this layer here, or leave the layer out in PEFT"
        )
    return _disagree(path, A, B)


def _disagree(path: str, A: Tensor, B: Tensor) -> str:
    return f"'{path}': A {tuple(A.shape)} and B {tuple(B.shape)} disagree on the rank"
