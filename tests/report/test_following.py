"""Following a metrics.jsonl: whatever pieces it is written in, the same is read, in memory that stays small."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadhead.report.following import Frames, MetricsFollower, thin


@given(st.integers(2, 40), st.integers(1, 500))
def test_frames_stay_few_and_even(most: int, count: int) -> None:
    frames = Frames(most)
    for step in range(count):
        frames.add(10 * step, step)
        steps = [kept for kept, _ in frames.kept]
        assert len(steps) <= most + 1
        assert steps[-1] == 10 * step
        assert steps == [10 * row for _, row in frames.kept]
    assert steps[0] == 0
    gaps = {after - before for before, after in pairwise(steps)}
    # All but the last are equally far apart.
    assert len({after - before for before, after in pairwise(steps[:-1])}) <= 1
    assert count <= most or gaps


def _line(step: int) -> dict[str, Any]:
    return {
        "phase": "prune" if step % 3 else "train",
        "step": step,
        "loss": 1.0 / step,
        **({"l0": float(step)} if step % 2 else {}),
        "open_probability": {"0": [0.5, 1 / step]},
        "output_difference": {"0": [step, 0.0]},
        "heads": [2],
    }


def _read(follower: MetricsFollower) -> dict[str, Any]:
    return {
        name: (found.steps, found.scalars, found.open_probability.kept, found.difference)
        for name, found in follower.phases.items()
    }


@given(st.integers(1, 12), st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_pieces_are_read_like_the_whole(tmp_path_factory: pytest.TempPathFactory, count: int, sizes: list[int]) -> None:
    path = tmp_path_factory.mktemp("pieces") / "metrics.jsonl"
    text = "".join(json.dumps(_line(step)) + "\n" for step in range(1, count + 1)).encode()
    follower = MetricsFollower(path)
    assert not follower.update()
    begin = 0
    for size in [*sizes, len(text)]:
        with path.open("ab") as file:
            file.write(text[begin : begin + size])
        begin += size
        follower.update()
    whole = MetricsFollower(path)
    assert whole.update()
    assert not follower.update()
    assert _read(follower) == _read(whole)
    assert sum(len(found.steps) for found in whole.phases.values()) == count
    # A number that was not logged at a step is known to be missing there.
    for found in whole.phases.values():
        values = found.scalars.get("l0", [None] * len(found.steps))
        assert [value is None for value in values] == [step % 2 == 0 for step in found.steps]


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(_line(step)) + "\n" for step in range(1, 9)))
    follower = MetricsFollower(path)
    follower.update()
    # As a resumed run does: the same beginning, and what comes after it anew.
    (tmp_path / "new").write_text("".join(json.dumps(_line(step)) + "\n" for step in (1, 2)))
    (tmp_path / "new").replace(path)
    assert follower.update()
    assert sorted(step for found in follower.phases.values() for step in found.steps) == [1, 2]


def test_what_is_no_line_of_ours_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ["[]", "nonsense", '{"phase": "train"}', '{"step": 1}', '{"phase": "train", "step": "x"}', "7", ""]
    path.write_text("\n".join([*lines, json.dumps(_line(4))]) + "\n" + '{"phase": "pru')
    follower = MetricsFollower(path)
    assert follower.update()
    assert {name: found.steps for name, found in follower.phases.items() if found.steps} == {"prune": [4]}


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=400), st.sampled_from([10, 50]))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values: list[float | None], most: int) -> None:
    known = [(step, value) for step, value in enumerate(values) if value is not None]
    steps, thinned = thin(list(range(len(values))), values, most)
    assert list(zip(steps, thinned, strict=True)) == [point for point in known if point[0] in set(steps)]
    if len(known) <= most:
        assert len(steps) == len(known)
        return
    assert len(steps) <= most + 2
    assert (steps[0], steps[-1]) == (known[0][0], known[-1][0])
    heights = [value for _, value in known]
    assert {min(heights), max(heights)} <= set(thinned)
