"""What a prepared run is, as data: its settings for ``config.yaml``, and a hash of its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.training.checkpoint import Facts
from lorakit.training.config import SHORTHANDS, TrainConfig
from lorakit.training.prepare import Prepared

# What may be another when a run is resumed: it changes no number but by rounding, or is written down on the way.
FREE_SETTINGS = (
    *("model", "data", "save_every", "keep", "log_to", "halve_micro_at", "trust_remote_code", "revision"),
    *("recompute", "cache_prefix"),
)


def resolved(config: TrainConfig, prepared: Prepared, model: Any, rows: Any) -> dict[str, Any]:
    """Return the settings as decided, ready for ``config.yaml``; training with them again is the same run.

    Folders and files are named from the root, so that the run can be resumed from anywhere.
    """
    recipe = prepared.recipe
    values: dict[str, Any] = {"model": _place(model), "data": _place(rows)}
    values |= json.loads(config.model_dump_json(exclude={"output", "force", "model", "data", *SHORTHANDS}))
    values.update(
        task=prepared.spec.task,
        method=prepared.method.summary(),
        epochs=recipe.epochs,
        lr=recipe.lr,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        packing="on" if recipe.packing else "off",
        recompute="on" if recipe.recompute else "off",
        eval_every=recipe.eval_every,
        max_length=recipe.max_length,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=prepared.base.revision,
    )
    if isinstance(config.validation, str):
        values["validation"] = _place(config.validation)
    return values


def facts_of(settings: Mapping[str, Any], rows: str, identity: str, processes: int) -> Facts:
    """Return what must be the same for a checkpoint to go on; the settings as JSON gives them back."""
    decisive = json.loads(json.dumps({name: v for name, v in settings.items() if name not in FREE_SETTINGS}))
    return Facts(decisive, rows, identity, processes)


def hash_of_rows(prepared: Prepared) -> str:
    """Return a hash of all encoded rows: other examples, another split or another tokenizer give another one."""
    whole = hashlib.sha256()
    for rows in (prepared.train, prepared.held):
        whole.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            whole.update(json.dumps([row.number, row.input_ids, row.labels]).encode())
    return whole.hexdigest()[:32]


def _place(value: Any) -> str | None:
    """Return a file or folder from the root, a hub's name as it is, None for an object."""
    if not isinstance(value, (str, Path)):
        return None
    place = Path(value).expanduser()
    return str(place.absolute()) if place.exists() else str(value)
