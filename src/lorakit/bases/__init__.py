"""Base models: from a name to a frozen model, its tokenizer, its outline, and back to a folder."""

from lorakit.bases.header import TensorInfo, read_header
from lorakit.bases.load import DTYPES, TASKS, Base, load_base
from lorakit.bases.outline import (
    LayerGroup,
    LayerLine,
    ModelOutline,
    describe_model,
    describe_module,
    group_layers,
)
from lorakit.bases.save import check_free, save_model
from lorakit.bases.source import model_kind
from lorakit.bases.tokenizer import NO_LIMIT, context_length, is_chat_model, load_tokenizer

__all__ = [
    "DTYPES",
    "NO_LIMIT",
    "TASKS",
    "Base",
    "LayerGroup",
    "LayerLine",
    "ModelOutline",
    "TensorInfo",
    "check_free",
    "context_length",
    "describe_model",
    "describe_module",
    "group_layers",
    "is_chat_model",
    "load_base",
    "load_tokenizer",
    "model_kind",
    "read_header",
    "save_model",
]
