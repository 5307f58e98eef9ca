"""What models replied, as it is kept in a sweep's folder; sweeps that reply are in `test_sweeping.py`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deadhead import InputError
from deadhead.measure.replies import Reply
from deadhead.training.runs.replying import kept_replies

_REPLY = Reply(asked="Why?", prompt=(1, 2), tokens=(3,), text="Because.")


def test_replies_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert kept_replies(tmp_path) == {}
    (tmp_path / "replies.json").write_text(json.dumps({"dense": [asdict(_REPLY)], "params-0.8": []}))
    assert kept_replies(tmp_path) == {"dense": (_REPLY,), "params-0.8": ()}


@pytest.mark.parametrize(
    ("dense", "place"),
    [
        (5, "dense"),
        ([{"foo": 1}], "dense.0"),
        (["a"], "dense.0"),
        ([{**asdict(_REPLY), "asked": []}], "dense.0.asked"),
        ([{**asdict(_REPLY), "tokens": ["a"]}], "dense.0.tokens.0"),
    ],
)
def test_what_is_no_list_of_replies_is_told_of(tmp_path: Path, dense: Any, place: str) -> None:
    (tmp_path / "replies.json").write_text(json.dumps({"dense": dense}))
    with pytest.raises(InputError, match=rf"was expected in .*, but its {place}\S* is not; delete it"):
        kept_replies(tmp_path)
