"""Idx files as MNIST's publishers write them, and folders of them."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

Write = Callable[..., Path]


def idx_bytes(entries: Tensor, kind: int = 8) -> bytes:
    """Return the content of an idx file of unsigned bytes; ``kind`` is the byte that names the entries' type."""
    header = bytes((0, 0, kind, entries.dim())) + struct.pack(f">{entries.dim()}I", *entries.shape)
    return header + bytes(entries.flatten().tolist())


def some_digits(count: int = 200, side: int = 28, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make images of noise and labels 0 to 9, equally many of each."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, side, side), generator=chance, dtype=torch.uint8)
    return pixels, torch.arange(count, dtype=torch.uint8) % 10


@pytest.fixture
def mnist(tmp_path: Path) -> Write:
    """Return a function that writes images and labels of one set into a folder and returns the folder."""

    def write(
        pixels: Tensor | None, labels: Tensor | None, name: str = "t10k", mark: str = "-", gz: bool = False
    ) -> Path:
        folder = tmp_path / "mnist"
        folder.mkdir(exist_ok=True)
        for kind, num_dims, entries in (("images", 3, pixels), ("labels", 1, labels)):
            if entries is not None:
                content = idx_bytes(entries)
                file = folder / f"{name}-{kind}{mark}idx{num_dims}-ubyte{'.gz' if gz else ''}"
                file.write_bytes(gzip.compress(content) if gz else content)
        return folder

    return write
