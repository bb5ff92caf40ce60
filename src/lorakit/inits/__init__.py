"""Initialisations: how a low-rank pair starts. One file each; the file is the registry."""

from lorakit.inits.calibration import Calibration
from lorakit.inits.init import Init, find_init, init_names

__all__ = ["Calibration", "Init", "find_init", "init_names"]
