"""Sets of examples by their name on the Hugging Face hub, through ``datasets`` and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import DataError, did_you_mean
from lorakit.training.data.saved import tables_of
from lorakit.training.data.table import Table

_NAME = re.compile(
    r"^(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)"
    r"(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?:\[(?P<split>[^\[\]]+(?:\[[^\]]*\])?)\])?$"
)


@dataclass(frozen=True)
class HubName:
    """A set on the hub: ``org/name:config@revision[split]``, of which all but the name may be left out."""

    name: str
    config: str | None
    revision: str | None
    split: str | None


def may_be_hub_name(text: str, suffixes: Sequence[str]) -> bool:
    """Tell whether a text that is no place here could name a set on the hub: it does not look like a file."""
    match = _NAME.match(text)
    if match is None or Path(match["name"]).suffix.lower() in suffixes:
        return False
    # A folder of that name beside it, and it is a path whose last part is wrong.
    return not ("/" in match["name"] and Path(match["name"]).parent.is_dir())


def parse_hub_name(text: str) -> HubName:
    """Read a name on the hub.

    Raises:
        DataError: it is none.
    """
    match = _NAME.match(text)
    if match is None:
        raise DataError(f"'{text}' is no name on the hub. As in: org/name, org/name:config, org/name@revision[split].")
    return HubName(match["name"], match["config"], match["revision"], match["split"])


def read_hub(text: str) -> dict[str, Table]:
    """Read a set from the hub, or from the cache of ``datasets`` where the hub cannot be reached.

    Raises:
        DataError: there is no such set, config, revision or split; or it can neither be reached nor is it in the cache.
    """
    import datasets

    asked = parse_hub_name(text)
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision)
            _refuse_unknown_revision(text, asked, builder)
            builder.download_and_prepare()
            found = builder.as_dataset(split=asked.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_failure(text, asked, error)) from error
    splits = {"train": found} if asked.split is not None else found
    return tables_of(splits, text)


def _refuse_unknown_revision(text: str, asked: HubName, builder: object) -> None:
    """Refuse a set from the cache of ``datasets`` where a revision was asked for: it does not say which it has."""
    if asked.revision is not None and type(builder).__module__.startswith("datasets.packaged_modules.cache"):
        raise DataError(
            f"'{text}': the hub cannot be reached, and the cached set does not say of which revision it is. "
            f"Leave '@{asked.revision}' out to take it as it is, or connect."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the package's own bars and log lines off the terminal."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _failure(text: str, asked: HubName, error: Exception) -> str:
    from huggingface_hub import constants

    start = f"'{text}' is neither a file nor a folder here, and could not be had from the Hugging Face hub: "
    said = str(error).strip().splitlines() or [type(error).__name__]
    words = str(error)
    near = did_you_mean(asked.name, [entry.name for entry in Path().iterdir()])
    if "Config name is missing" in words or "BuilderConfig" in words:
        return f"'{text}': {' '.join(said)[:600]} Say one: {asked.name}:CONFIG."
    if "Unknown split" in words or "Bad split" in words:
        return f"'{text}': {said[0]}"
    if constants.HF_HUB_OFFLINE:
        return f"{start}HF_HUB_OFFLINE is set, and the cache of datasets does not have it: {said[0]}{near}"
    if isinstance(error, (ConnectionError, TimeoutError)) or "reach" in words:
        return f"{start}it cannot be reached, and the set is not in the cache of datasets. Check the network.{near}"
    return f"{start}{said[0]}{near}"
