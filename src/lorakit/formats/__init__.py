"""File formats: an adapter's plain data to files and back. One file each; the file is the registry."""

from lorakit.formats.format import Format, find_format, formats
from lorakit.formats.peft import PeftFormat
from lorakit.formats.store import load_adapter, read_adapter, save_adapter

__all__ = ["Format", "PeftFormat", "find_format", "formats", "load_adapter", "read_adapter", "save_adapter"]
