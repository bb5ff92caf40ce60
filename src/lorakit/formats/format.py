"""``Format``: the contract of a file format, and how one is found for a folder.

A format turns files into an :class:`AdapterState` and back, as pure functions: neither sees a model.
It refuses rather than losing anything silently. The file is the registry: a new format is one file.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.errors import FormatError, quoted
from lorakit.formats.tensors import TensorFile

Files = Mapping[str, str | TensorFile]
"""Files by name: a text, or named tensors with metadata."""


class Format(ABC):
    """How an adapter is spelled in files.

    Attributes:
        name: how it is called in messages and listings.
    """

    name: ClassVar[str]

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Tell from the names of its files whether a folder holds an adapter of this format."""

    @abstractmethod
    def read(self, folder: Path, device: str | torch.device | None = None) -> Files:
        """Read the format's files, tensors onto ``device`` (the CPU by default).

        Raises:
            FormatError: a file is missing, is a pickle, or is not what its name says.
        """

    @abstractmethod
    def decode(self, files: Files) -> AdapterState:
        """Return what the files say.

        Raises:
            FormatError: something in them is not understood, contradicts itself or is not supported.
        """

    @abstractmethod
    def encode(self, state: AdapterState) -> dict[str, str | TensorFile]:
        """Return the files that say what ``state`` is.

        Raises:
            FormatError: the format has no way to say it.
        """

    def base_weights(self, files: Files) -> Mapping[str, Tensor]:
        """Return copies of the base's own tensors that lie beside the adapter, by the base's names."""
        return {}


@functools.cache
def formats() -> tuple[Format, ...]:
    """Return all formats, sorted by name."""
    import lorakit.formats as package

    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(package.__path__, "lorakit.formats."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, Format) and not inspect.isabstract(kind):
                found[kind.name] = kind()
    return tuple(found[name] for name in sorted(found))


def find_format(folder: Path) -> Format:
    """Return the format of the adapter in ``folder``.

    Raises:
        FormatError: the folder is missing or holds no adapter of a known format.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FormatError(f"adapter folder '{folder}' {what}. Name the folder that holds the adapter's files.")
    for candidate in formats():
        if candidate.recognises(folder):
            return candidate
    inside = sorted(child.name for child in folder.iterdir())
    deeper = [child for child in inside if any(f.recognises(folder / child) for f in formats())]
    advice = f" Its folders {quoted(deeper)} hold adapters: name one of them." if deeper else ""
    found = quoted(inside) if inside else "nothing"
    known = ", ".join(f.name for f in formats())
    raise FormatError(f"'{folder}' holds no adapter of a known format ({known}); found {found}.{advice}")
