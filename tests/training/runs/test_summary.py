"""A run's summary.json is checked when it is read: a changed digit is found, and a wrong value is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deadhead.errors import InputError
from deadhead.training.runs.summary import SUMMARY_FILE, read_summary, write_summary

_STAGE = {
    "heads": [4, 2],
    "parameters": 1000,
    "flops_per_token": 2000.0,
    "perplexity": 3.5,
    "bits_per_byte": 1.2,
    "tokens_per_second": 99.5,
    "steps": 7,
}
_WHOLE: dict[str, Any] = {
    "data": {"source": "prose.txt", "sha256": "ab" * 32, "tokens": 1234},
    "processes": 1,
    "versions": {"torch": "2"},
    "dense": _STAGE,
    "cut": {**_STAGE, "blocks": [1, 2], "perplexity": None},
    "budget": {"kind": "sparsity", "asked": 0.5, "reached": 0.5},
    "samples": {"dense": "The ünd"},
}


def test_round_trip(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    write_summary(tmp_path, _WHOLE)
    assert read_summary(tmp_path) == _WHOLE


def test_one_of_an_earlier_version_has_no_checksum(tmp_path: Path) -> None:
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(_WHOLE))
    assert read_summary(tmp_path) == _WHOLE


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    write_summary(tmp_path, _WHOLE)
    path = tmp_path / SUMMARY_FILE
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for bit in (0, 4, 6):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                found = read_summary(tmp_path)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                # A blank that became another, or a checksum under another name.
                assert found == _WHOLE or b'"checksum"' not in flipped


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"dense": 3}, "dense"),
        ({"dense": None}, "dense"),
        ({"dense": {**_STAGE, "heads": "all"}}, "dense.heads"),
        ({"dense": {**_STAGE, "heads": [True]}}, "dense.heads.0"),
        ({"dense": {**_STAGE, "flops_per_token": 0}}, "dense.flops_per_token"),
        ({"dense": {**_STAGE, "perplexity": "low"}}, "dense.perplexity"),
        ({"dense": {**_STAGE, "flops_per_token": 1e30}}, "dense.flops_per_token"),
        ({"dense": {**_STAGE, "heads": []}}, "dense.heads"),
        ({"dense": {**_STAGE, "perplexity": float("inf")}}, "dense.perplexity"),
        ({"dense": {**_STAGE, "tokens_per_second": 0.0}}, "dense.tokens_per_second"),
        ({"dense": {**_STAGE, "steps": 10**400}}, "dense.steps"),
        ({"budget": {"kind": "size", "asked": 0.5, "reached": 0.5}}, "budget.kind"),
        ({"control": {"steps": 3}}, "control.heads"),
        ({"data": []}, "data"),
        ({"data": {**_WHOLE["data"], "sha256": 3}}, "data.sha256"),
        ({"processes": "two"}, "processes"),
        ({"budget": {"kind": "sparsity"}}, "budget.asked"),
        ({"samples": {"dense": 3}}, "samples.dense"),
        ({"samples": ["a"]}, "samples"),
        ({"versions": {"torch": 2}}, "versions.torch"),
        ({"rolled_back": {"train": 1}}, "rolled_back.train"),
    ],
)
def test_a_wrong_value_is_named(changed: dict[str, Any], where: str, tmp_path: Path) -> None:
    (tmp_path / SUMMARY_FILE).write_text(json.dumps({**_WHOLE, **changed}))
    with pytest.raises(InputError, match=f"wrong value for '{where}'") as caught:
        read_summary(tmp_path)
    assert "\n" not in str(caught.value)
