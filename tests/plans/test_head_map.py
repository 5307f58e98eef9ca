"""The head map, as characters and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadhead import HeadPlan, InputError, UnitPlan
from deadhead.plans.head_map import head_map_text
from deadhead.plans.picture import gate_courses, save_head_map

_PLAN = HeadPlan(kept={0: (0, 2), 1: (), 2: (0, 1, 2, 3)}, total={0: 4, 1: 4, 2: 4})


def _metrics(plan: HeadPlan, steps: int = 5) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"phase": "train", "step": 1, "loss": 3.0}]
    for step in range(1, steps + 1):
        chances = {
            str(layer): [0.9 if head in plan.kept[layer] else 0.9 / step for head in range(count)]
            for layer, count in plan.total.items()
        }
        lines.append({"phase": "prune", "step": step, "loss": 2.0, "open_probability": chances})
    return lines


_plans = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=12).map(
    lambda rows: HeadPlan(
        kept={layer: [head for head, stays in enumerate(row) if stays] for layer, row in enumerate(rows)},
        total={layer: len(row) for layer, row in enumerate(rows)},
    )
)


@given(_plans)
def test_characters_are_the_plan(plan: HeadPlan) -> None:
    lines = head_map_text(plan).splitlines()
    assert len(lines) == len(plan.total)
    for (layer, count), line in zip(plan.total.items(), lines, strict=True):
        assert line.startswith("layer ")
        assert line.split()[1] == str(layer)
        cells = line.split()[2:-1]
        assert [cell == "■" for cell in cells] == [head in plan.kept[layer] for head in range(count)]
        assert set(cells) <= {"■", "·"}
        assert line.endswith(f"{len(plan.kept[layer])}/{count}")
    assert head_map_text(plan).count("■") == sum(plan.heads)
    # The columns stand below each other.
    assert len({line.index(line.split()[2]) for line in lines}) == 1


def test_the_text_to_the_character() -> None:
    assert head_map_text(_PLAN) == "layer 0  ■ · ■ ·  2/4\nlayer 1  · · · ·  0/4\nlayer 2  ■ ■ ■ ■  4/4"


def test_courses_of_the_gates() -> None:
    steps, courses = gate_courses(_metrics(_PLAN, 3))
    assert steps == [1, 2, 3]
    assert list(courses) == ["0", "1", "2"]
    assert courses["0"][1] == [0.9, 0.45, 0.9, 0.45]
    assert gate_courses([]) == ([], {})
    assert gate_courses([{"phase": "train", "step": 1, "loss": 3.0}]) == ([], {})


def _colours(path: Path) -> dict[str, int]:
    """Return how many pixels have the colour of heads that stay, and that of the others."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    blue, orange = np.array([0, 0x72, 0xB2]), np.array([0xE6, 0x9F, 0])
    return {
        "kept": int((abs(pixels - blue).max(-1) < 3).sum()),
        "cut": int((abs(pixels - orange).max(-1) < 3).sum()),
        "white": int((pixels > 252).all(-1).sum()),
        "all": pixels.shape[0] * pixels.shape[1],
    }


def test_the_picture_shows_what_stays_and_what_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "map.png"
    save_head_map(_PLAN, _metrics(_PLAN), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    mixed = _colours(path)
    assert mixed["kept"] > 1000
    assert mixed["cut"] > 500
    assert 0.5 < mixed["white"] / mixed["all"] < 0.98
    colours = {}
    for name, kept in (("all", (0, 1, 2, 3)), ("none", ())):
        plan = HeadPlan(kept=dict.fromkeys(range(3), kept), total=_PLAN.total)
        save_head_map(plan, [], path)
        colours[name] = _colours(path)
    assert colours["all"]["cut"] == 0
    assert colours["none"]["kept"] == 0
    assert colours["all"]["kept"] > mixed["kept"] / 2
    assert colours["none"]["cut"] > 0


def test_hidden_units_are_counted_beside_the_heads(tmp_path: Path) -> None:
    units = UnitPlan.of_blocks(size=4, kept={0: (1,), 2: ()}, total={0: 16, 1: 16, 2: 8})
    plan = HeadPlan(kept={0: (0,)}, total={0: 2, 1: 2}, hidden_units=units)
    assert head_map_text(plan).splitlines() == [
        "layer 0  ■ ·  1/2, hidden units 4/64",
        "layer 1  ■ ■  2/2, hidden units 64/64",
        "layer 2    hidden units 0/32",
    ]
    save_head_map(plan, [], tmp_path / "map.png")
    assert _colours(tmp_path / "map.png")["kept"] > 100


@pytest.mark.parametrize(
    "plan",
    [
        HeadPlan(kept={}, total={0: 1}),
        HeadPlan(kept={0: ()}, total={0: 3, 1: 16}),
        HeadPlan(kept={5: (1,)}, total=dict.fromkeys(range(24), 12)),
    ],
)
def test_pictures_of_other_shapes(plan: HeadPlan, tmp_path: Path) -> None:
    save_head_map(plan, _metrics(plan), tmp_path / "map.png")
    assert _colours(tmp_path / "map.png")["kept"] > 100


def test_metrics_of_a_second_cut_have_fewer_heads(tmp_path: Path) -> None:
    """Gates exist for the heads that are left; their courses are left out where they cannot be told apart."""
    metrics = _metrics(HeadPlan(kept={}, total={0: 2, 2: 4}))
    save_head_map(_PLAN, metrics, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        save_head_map(_PLAN, [], tmp_path / "file" / "map.png")
