"""Methods: one file each. A method is a type, and it is its own config. The file is the registry."""

from lorakit.methods.method import (
    AdapterParts,
    Calibrated,
    Method,
    ModelPart,
    Selection,
    Update,
    find_method,
    method_names,
)
from lorakit.methods.rule import Rule

__all__ = [
    "AdapterParts",
    "Calibrated",
    "Method",
    "ModelPart",
    "Rule",
    "Selection",
    "Update",
    "find_method",
    "method_names",
]
