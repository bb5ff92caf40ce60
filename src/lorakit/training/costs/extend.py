"""Large models from a few of their blocks: where all blocks are alike, every cost is a line in their number.

Two and four blocks give the line; six must lie on it, and the numbers that are trained must come out whole. Else, and
for small models, everything is simulated. Phases of a step are extended apart, since a model of many blocks may have
its peak elsewhere than one of two.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorakit.training.costs.parts import PARTS, PHASES
from lorakit.training.costs.simulate import Cost, Setup, simulate
from lorakit.training.data.encode import EncodedRow

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FEWEST_BLOCKS = 9
FEW, MORE, CHECKED = 2, 4, 6
TOLERANCE = 1e-3
"""Of the largest part: what rounding up to whole tensors may do to the check."""


def cost_of(setup: Setup, rows: Sequence[EncodedRow]) -> Cost:
    """Simulate one micro-batch ``rows``, see :func:`simulate`; large models of like blocks by extension.

    Raises:
        ModelError, InputError: as for :func:`simulate`.
    """
    number = num_like_blocks(setup)
    if number is None:
        return simulate(setup, rows)
    few, more, checked = (
        simulate(replace(setup, config=with_blocks(setup.config, n)), rows) for n in (FEW, MORE, CHECKED)
    )
    if not _alike(few.extended(more, _factor(CHECKED)), checked):
        return simulate(setup, rows)
    return few.extended(more, _factor(number))


def num_like_blocks(setup: Setup) -> int | None:
    """Return how many blocks the model has, if they may be taken for alike; None where that is not worth it."""
    config: Any = setup.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return None
    number = getattr(config, "num_hidden_layers", None)
    if not isinstance(number, int) or number < FEWEST_BLOCKS:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        return None
    return None if _names_blocks(setup.attaching) else number


def with_blocks(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """Return the config of a model with ``number`` blocks."""
    changed: Any = copy.deepcopy(config)
    changed.num_hidden_layers = number
    if getattr(changed, "layer_types", None) is not None:
        changed.layer_types = list(changed.layer_types)[:number]
    return changed  # type: ignore[no-any-return]


def _factor(number: int) -> float:
    return (number - FEW) / (MORE - FEW)


def _names_blocks(attaching: dict[str, Any]) -> bool:
    """Tell whether only some blocks are adapted."""
    if attaching.get("layers") is not None:
        return True
    given = [attaching.get(name) or () for name in ("targets", "exclude", "train_modules")]
    entries: list[str] = [entry for value in given for entry in ([value] if isinstance(value, str) else _texts(value))]
    return any(entry.startswith("re:") or re.search(r"(^|\.)\d+(\.|$)", entry) for entry in entries)


def _texts(value: Iterable[Any]) -> list[str]:
    return [str(entry) for entry in value]


def _alike(guessed: Cost, found: Cost) -> bool:
    if (guessed.num_trainable, guessed.state_bytes) != (found.num_trainable, found.state_bytes):
        return False
    for phase in PHASES:
        one, other = getattr(guessed.peaks, phase), getattr(found.peaks, phase)
        if any(abs(getattr(one, p) - getattr(other, p)) > TOLERANCE * max(other.total, 1) for p in PARTS):
            return False
    return True
