"""Methods: one file each. A method is a type, and it is its own config. The file is the registry."""

from lorakit.methods.method import (
    AdapterParts,
    Method,
    ModelPart,
    Selection,
    Update,
    find_method,
    method_names,
)

__all__ = ["AdapterParts", "Method", "ModelPart", "Selection", "Update", "find_method", "method_names"]
