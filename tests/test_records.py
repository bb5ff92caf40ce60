"""Records to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lorakit.records import (
    Choice,
    ClassScore,
    Evaluation,
    LayerSpectrum,
    Proof,
    RunSummary,
    Sample,
    from_json,
    to_json,
)

TOKENS = Evaluation(1.25, 3, num_tokens=40, perplexity=3.5, accuracy=0.5)
CLASSES = Evaluation(
    loss=0.5,
    num_rows=3,
    accuracy=2 / 3,
    macro_f1=0.6,
    classes=(ClassScore("grün", 0.5, 1.0, 2 / 3, 1), ClassScore("rot", 1.0, 0.5, 2 / 3, 2)),
    confusion=((1, 0), (1, 1)),
)
SUMMARY = RunSummary(
    task="classification",
    model="some/model",
    revision=None,
    method={"name": "lora", "rank": 8, "rank_pattern": {"q": 4}},
    identity="b7f2a90c41de",
    labels=("grün", "rot"),
    before=CLASSES,
    after=CLASSES,
    majority=None,
    probe=CLASSES,
    num_trainable=10,
    num_head=2,
    num_base=100,
    seconds=1.5,
    tokens_per_s=20.25,
    peak_memory_bytes=None,
    adapter_bytes=40,
    num_train_rows=9,
    num_steps=3,
    num_epochs=1.5,
    choices=(Choice("lr", "0.001", "as asked"),),
    samples=(Sample("in", "grün", "rot (0.51)", "grün (0.9)"),),
    spectra=(LayerSpectrum("layer.0", (3.0, 0.1)), LayerSpectrum("layer.1", (), 2.0)),
    notes=("one note",),
    proof=Proof(True, "ab", 1e-7, 1e-4, True),
)
RECORDS = [TOKENS, CLASSES, Proof(False, "cd"), SUMMARY, dataclasses.replace(SUMMARY, proof=None, probe=None)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_from_a_file_as_it_was(record: Any) -> None:
    assert from_json(type(record), json.loads(json.dumps(to_json(record)))) == record


def test_numbers_come_back_bit_for_bit() -> None:
    record = Evaluation(0.1 + 0.2, 1, accuracy=1 / 3)
    assert from_json(Evaluation, json.loads(json.dumps(to_json(record)))) == record


def test_keys_of_a_later_version_are_left_out() -> None:
    assert from_json(Evaluation, {**to_json(TOKENS), "calibration": 0.1}) == TOKENS


def test_fields_that_an_earlier_version_lacked_get_their_default() -> None:
    value = {key: item for key, item in to_json(SUMMARY).items() if key not in ("notes", "proof", "version")}
    assert from_json(RunSummary, value) == dataclasses.replace(SUMMARY, notes=(), proof=None, version="")


def test_a_missing_field_without_a_default_is_named() -> None:
    value = {key: item for key, item in to_json(SUMMARY).items() if key != "num_steps"}
    with pytest.raises(KeyError, match="num_steps"):
        from_json(RunSummary, value)


def test_containers_of_records_become_plain_json() -> None:
    assert to_json({"a": [Choice("x", "1", "why")], 2: (1, None)}) == {
        "a": [{"name": "x", "value": "1", "reason": "why"}],
        "2": [1, None],
    }
