"""Files that deadhead parses itself, damaged at random: each gives a value or one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks._fuzz import Target, damaged, fuzz, targets

_KINDS = (
    *("recipe", "head plan", "gate constants", "gate values", "metrics", "run: summary.json", "run: metrics.jsonl"),
    *("run: recipe.toml", "run: head_plan.json", "latencies", "checksums", "configuration", "index"),
    "header of a shard",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}


def test_no_kind_is_left_out(found: dict[str, Target]) -> None:
    assert tuple(found) == _KINDS


@pytest.mark.parametrize("kind", _KINDS)
def test_a_value_or_one_sentence(kind: str, found: dict[str, Target]) -> None:
    outcome = fuzz(found[kind], 60, seed=1)
    assert outcome.faults == []
    assert outcome.read + outcome.refused == 60


def test_a_fault_is_found(tmp_path: Path) -> None:
    """A reader that does not care falls over soon."""
    path = tmp_path / "numbers"
    path.write_bytes(b"[1, 2, 3]")
    outcome = fuzz(
        Target(name="numbers", path=path, read=lambda: sum(map(int, path.read_text()[1:-1].split(",")))), 60, 0
    )
    assert outcome.faults
    assert path.read_bytes() == b"[1, 2, 3]", "the good file is back"


def test_damage_is_the_same_for_a_seed() -> None:
    data = b'{"a": [1, {"b": null}], "c": "d"}'
    first, second = ([damaged(data, draw) for _ in range(200)] for draw in (random.Random(3), random.Random(3)))
    assert first == second
    assert len({*first} - {data}) > 100
