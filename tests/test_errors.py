"""Arguments of the wrong type are refused in one sentence, and those that are right are left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from deadhead.errors import InputError, first_line, typed


@typed
def door(
    model: PreTrainedModel | str,
    *,
    number: int = 1,
    share: float | None = None,
    kind: Literal["a", 1] = "a",
    files: Sequence[Path] = (),
    metrics: Mapping[str, float] | None = None,
    tell: Callable[[int], None] | None = None,
    **others: Any,
) -> str:
    """Say that all is well."""
    return "well"


@pytest.mark.parametrize(
    "given",
    [
        {"number": np.int64(3), "share": np.float32(0.5)},
        {"share": 1, "kind": 1},
        {"files": [Path("a")], "metrics": {"a": 1}},
        {"tell": print, "anything": ...},
    ],
    ids=str,
)
def test_what_is_right_is_taken(given: dict[str, Any]) -> None:
    assert door("name", **given) == "well"
    # The function itself says what is to be done with a model in a wrapper.
    assert door(nn.DataParallel(nn.Linear(1, 1)), **given) == "well"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"number": 1.5}, "door takes number as int, but got 1.5"),
        ({"number": True}, "as int, but got True"),
        ({"number": "3"}, "as int, but got '3'"),
        ({"share": "all"}, r"as float \| None, but got 'all'"),
        ({"kind": "b"}, "as Literal"),
        ({"kind": True}, "as Literal"),
        ({"kind": torch.ones(2)}, "got an object of type Tensor"),
        ({"files": "a"}, "as Sequence"),
        ({"files": ["a"]}, "as Sequence"),
        ({"metrics": [1]}, "as Mapping"),
        ({"metrics": {"a": "b"}}, "as Mapping"),
        ({"tell": 5}, "as Callable"),
        ({"model": nn.Linear(1, 1)}, "got an object of type Linear"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        door(**{"model": "name", **given})
    assert len(str(caught.value)) <= 300


def test_our_own_faults_stay_what_they_are() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        door()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"door\(\) takes 1 positional argument but 2 were given"):
        door("name", 1)  # type: ignore[call-arg]
    assert door(LlamaForCausalLM.__new__(LlamaForCausalLM)) == "well"
    assert LlamaConfig is not None


def test_a_line_that_begins_a_list_is_not_cut_off() -> None:
    assert first_line(ValueError("One of:\n(1) a\n(2) b")) == "One of: (1) a (2) b"
    assert first_line(ValueError("First.\nSecond.")) == "First"
    assert len(first_line(ValueError("x" * 999))) <= 200
