"""summary.json: a run's measurements so far, checked when they are read because runs resume from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from deadhead.disk.files import json_text, write_json
from deadhead.disk.reading import read_object
from deadhead.errors import InputError
from deadhead.plans.kinds import BudgetKind, Of
from deadhead.training.recipes.reading import explained

STAGES = ("dense", "gated", "cut", "finetuned")
RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
_CHECKSUM = "checksum"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


_Count = Annotated[int, Field(ge=0, le=10**6)]
# Null stands for a number that is not finite.
_Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None


class _Stage(_Part):
    heads: list[_Count] = Field(min_length=1)
    hidden_units: list[_Count] = []
    parameters: int = Field(ge=1, le=10**15)
    flops_per_token: float = Field(ge=1, le=1e18)
    perplexity: _Finite
    bits_per_byte: _Finite
    tokens_per_second: float = Field(ge=1e-6, le=1e15)
    steps: int = Field(ge=0, le=10**12)


class _Data(_Part):
    source: str
    sha256: str
    tokens: int


class _Budget(_Part):
    kind: BudgetKind
    of: Of = "all"
    asked: float = Field(ge=0, le=1e18)
    reached: float = Field(ge=0, le=1e18)


class _Summary(TypedDict, total=False):
    # What is there must be of its kind, but need not be there yet.
    dense: _Stage
    gated: _Stage
    cut: _Stage
    finetuned: _Stage
    control: _Stage
    data: _Data
    budget: _Budget
    model: dict[str, str]
    processes: int
    samples: dict[str, str]
    versions: dict[str, str]
    rolled_back: dict[str, dict[str, Any]]


def read_summary(folder: Path) -> dict[str, Any]:
    """Return a run's measurements, by stage and otherwise; an empty dictionary if there are none yet."""
    path = folder / SUMMARY_FILE
    if not path.exists():
        return {}
    values = read_object(path, what="summary of a run")
    checksum = values.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(values):
        raise InputError(
            f"The summary of a run {path} is not what was written: it is damaged or was edited; restore it, or remove "
            f'its "{_CHECKSUM}" if its contents are right.'
        )
    try:
        TypeAdapter(_Summary).validate_python(values)
    except ValidationError as error:
        raise InputError(f"The summary of a run {path} {explained(error, _Part)}; restore it.") from None
    return values


def write_summary(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a run's summary.json, completely or not at all, with a checksum of its contents."""
    write_json(folder / SUMMARY_FILE, {**values, _CHECKSUM: _checksum(values)})


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(values).encode()).hexdigest()
