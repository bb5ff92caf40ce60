"""Initialisations: how a low-rank pair starts. One file each; the file is the registry."""

from lorakit.inits.init import Init, find_init, init_names

__all__ = ["Init", "find_init", "init_names"]
