"""Names on the hub: how they are written, what the cache of ``datasets`` gives without a network, what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorakit.errors import DataError
from lorakit.training.data.hub import HubName, may_be_hub_name, parse_hub_name
from lorakit.training.data.read import read_splits


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn the network off also where the packages were loaded before the environment said so."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


SUFFIXES = (".jsonl", ".json", ".csv", ".gz")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/set", HubName("org/set", None, None, None)),
        ("imdb", HubName("imdb", None, None, None)),
        ("org/set.v2:en", HubName("org/set.v2", "en", None, None)),
        ("org/set@refs/pr/3", HubName("org/set", None, "refs/pr/3", None)),
        ("org/set[train_sft]", HubName("org/set", None, None, "train_sft")),
        ("org/set:en@v1[train[:10%]]", HubName("org/set", "en", "v1", "train[:10%]")),
    ],
)
def test_a_name_is_read_in_its_parts(text: str, found: HubName) -> None:
    assert parse_hub_name(text) == found


@pytest.mark.parametrize(
    "text",
    ["rows.jsonl", "org/rows.csv", "rows.jsonl.gz", "./rows", "/data/rows", "a/b/c", "~/rows", "what is it?", ""],
)
def test_what_looks_like_a_file_is_no_name(text: str) -> None:
    assert not may_be_hub_name(text, SUFFIXES)


def test_a_file_missing_from_a_folder_that_is_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)

    assert not may_be_hub_name("data/rows", SUFFIXES)
    with pytest.raises(DataError, match="there is no file 'data/rows'"):
        read_splits("data/rows")


def test_a_name_that_cannot_be_had_offline_is_told_with_what_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opinions").mkdir()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError, match=r"(?s)neither a file nor a folder.*HF_HUB_OFFLINE is set.*Closest: 'opinions'"):
        read_splits("opinons")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a set that ``datasets`` has in its cache, as a download would have left it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", 5), ("test", 2)):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * count)
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    datasets.disable_progress_bars()
    datasets.load_dataset("json", data_files=files)
    datasets.enable_progress_bars()
    (built,) = (tmp_path / "cache" / "json").glob("*/*/*/")
    place = tmp_path / "cache" / "org___set" / "default" / "0.0.0" / "abc"
    shutil.copytree(built, place)
    for file in place.glob("json-*.arrow"):
        file.rename(place / file.name.replace("json-", "set-"))
    facts = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(facts | {"dataset_name": "set"}))
    return "org/set"


def test_a_cached_set_is_read_without_a_network(cached: str) -> None:
    found = read_splits(cached)

    assert {split: (table.source, len(table.rows)) for split, table in found.items()} == {
        "train": ("org/set[train]", 5),
        "test": ("org/set[test]", 2),
    }


@pytest.mark.parametrize(("split", "count"), [("test", 2), ("train[:3]", 3)])
def test_a_split_that_is_named_is_trained_on(cached: str, split: str, count: int) -> None:
    (table,) = read_splits(f"{cached}[{split}]").values()

    assert len(table.rows) == count


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("[dev]", 'Unknown split "dev". Should be one of'),
        (":other", "for config 'other'"),
        ("@v1", "does not say of which revision it is"),
    ],
)
def test_what_a_cached_set_lacks_is_told(cached: str, more: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_splits(f"{cached}{more}")
