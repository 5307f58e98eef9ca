"""The head plan: round trips, and every kind of bad plan refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadhead.errors import InputError
from deadhead.plans.plan import HeadPlan, UnitKey


@st.composite
def plans(draw: st.DrawFn) -> HeadPlan:
    layers = draw(
        st.lists(st.integers(0, 99) | st.sampled_from(["encoder.0", "decoder.layers.1"]), unique=True, min_size=1)
    )
    total = {layer: draw(st.integers(1, 12)) for layer in layers}
    named = draw(st.sets(st.sampled_from(layers)))
    kept = {layer: draw(st.permutations(sorted(draw(st.sets(st.integers(0, total[layer] - 1)))))) for layer in named}
    return HeadPlan(
        kept=kept,
        total=total,
        unit=draw(st.sampled_from(["head", "kv_group"])),
        output_scale=draw(st.booleans()),
    )


@given(plan=plans())
@settings(deadline=None, max_examples=100)
def test_json_round_trip(plan: HeadPlan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "head_plan.json"
    plan.to_json(path)
    again = HeadPlan.from_json(str(path))
    assert again == plan and hash(again) == hash(plan)
    assert again.to_dict() == plan.to_dict() == json.loads(path.read_text())
    assert list(again.total) == list(plan.total), "the order of the layers is kept"


@given(plan=plans())
def test_kept_and_cut_share_out_the_heads(plan: HeadPlan) -> None:
    for layer, count in plan.total.items():
        assert sorted([*plan.kept[layer], *plan.cut(layer)]) == list(range(count))
        assert list(plan.kept[layer]) == sorted(plan.kept[layer])
    assert plan.heads == [len(plan.kept[layer]) for layer in plan.total]
    assert plan.sparsity == pytest.approx(sum(len(plan.cut(layer)) for layer in plan.total) / sum(plan.total.values()))


def test_the_file_is_the_documented_one(tmp_path: Path) -> None:
    HeadPlan(kept={1: [], 0: [5, 0, 2]}, total={0: 8, 1: 8}).to_json(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "version": 1,
        "unit": "head",
        "total": {"0": 8, "1": 8},
        "kept": {"0": [0, 2, 5], "1": []},
        "output_scale": False,
    }


def test_layers_that_are_not_named_keep_all_heads() -> None:
    plan = HeadPlan(kept={1: (0,)}, total={0: 3, 1: 3, 2: 2})
    assert plan.kept == {0: (0, 1, 2), 1: (0,), 2: (0, 1)}
    assert plan == HeadPlan(kept={0: (0, 1, 2), 1: (0,), 2: (0, 1)}, total={0: 3, 1: 3, 2: 2})
    assert HeadPlan.keep_all({0: 3, 1: 2}).heads == [3, 2] and HeadPlan.keep_all({0: 3}).sparsity == 0.0


def test_keys_may_be_numbers_in_strings_or_module_paths() -> None:
    assert HeadPlan(kept={"0": (1,)}, total={"0": 2}) == HeadPlan(kept={0: (1,)}, total={0: 2})
    plan = HeadPlan(kept={"decoder.layers.0": ()}, total={"encoder.layers.0": 4, "decoder.layers.0": 4})
    assert plan.heads == [4, 0] and plan.cut("decoder.layers.0") == (0, 1, 2, 3)


def test_plans_are_frozen_and_equal_by_value() -> None:
    plan = HeadPlan(kept={0: (1,)}, total={0: 2})
    with pytest.raises(AttributeError):
        plan.unit = "kv_group"  # type: ignore[misc]
    assert plan != HeadPlan(kept={0: (1,)}, total={0: 2}, output_scale=True)
    assert plan != HeadPlan(kept={0: (0,)}, total={0: 2})
    assert str(plan) == '{"0": [1]}'


def valid(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "unit": "head", "total": {"0": 4, "1": 4}, "kept": {"0": [0, 2], "1": []}, **changes}


def hidden(units: Any) -> dict[str, Any]:
    return valid(version=3, hidden_units=units)


BAD: dict[str, tuple[Any, str]] = {
    "not an object": ([1, 2], "must be a JSON object"),
    "null": (None, "must be a JSON object"),
    "a number": (3, "must be a JSON object"),
    "no total": ({"version": 1, "kept": {}}, "must be a JSON object with"),
    "no kept": ({"version": 1, "total": {"0": 4}}, "must be a JSON object with"),
    "version 4": (valid(version=4), "version 4, but this deadhead reads 1, 2 and 3"),
    "version true": (valid(version=True), "version True"),
    "blocks": (valid(version=2, blocks={"0": [1]}), '"size", "total" and "kept"'),
    "block size": (valid(version=2, blocks={"size": 0, "total": {"0": 2}, "kept": {}}), "block size"),
    "block": (valid(version=2, blocks={"size": 4, "total": {"0": 2}, "kept": {"0": [2]}}), "block 2 of layer 0"),
    "heads beyond measure": (valid(total={"0": 10**12, "1": 4}), "no model has over"),
    "a key that is nearly a number": (valid(kept={"--1": [0]}), "names layer '--1'"),
    "version as a fraction": (valid(version=1.0), "version 1.0"),
    "blocks in version 1": (
        valid(version=1, blocks={"size": 4, "total": {"0": 2}, "kept": {}}),
        "which belong to version 2",
    ),
    "blocks of nothing": (valid(version=2, blocks={}), '"size", "total" and "kept"'),
    "blocks as a list": (valid(version=2, blocks=[]), '"size", "total" and "kept"'),
    "blocks as a number": (valid(version=2, blocks=0), '"size", "total" and "kept"'),
    "hidden units in version 1": (valid(hidden_units={"total": {"0": 2}, "kept": {}}), "which belong to version 3"),
    "blocks in version 3": (
        valid(version=3, blocks={"size": 4, "total": {"0": 2}, "kept": {}}),
        "which belong to version 2",
    ),
    "hidden units of nothing": (hidden({}), '"hidden_units" must be a JSON object with "total" and "kept"'),
    "hidden units as a list": (hidden([]), '"hidden_units" must be a JSON object'),
    "hidden units kept as a list": (hidden({"total": {"0": 9}, "kept": [1]}), "must be JSON objects by layer"),
    "ranges as numbers": (
        hidden({"total": {"0": 9}, "kept": {"0": [1]}}),
        r"must be ranges, such as '0-4,6', but are \[1\]",
    ),
    "ranges of words": (
        hidden({"total": {"0": 9}, "kept": {"0": "0-x"}}),
        "must be ranges, such as '0-4,6', but have '0-x'",
    ),
    "a range backwards": (hidden({"total": {"0": 9}, "kept": {"0": "4-2"}}), "but have '4-2'"),
    "a range too far": (
        hidden({"total": {"0": 9}, "kept": {"0": "2-999999999"}}),
        "go up to 999999999, but there are 9",
    ),
    "ranges that overlap": (
        hidden({"total": {"0": 9}, "kept": {"0": "0-4,4"}}),
        "names a hidden unit of layer 0 twice",
    ),
    "ranges of an unknown layer": (
        hidden({"total": {"0": 9}, "kept": {"1": "0"}}),
        "names layer 1, but its totals have only: 0",
    ),
    "ranges again and again": (
        hidden({"total": {"0": 10**6}, "kept": {"0": ",".join(["0-999999"] * 100_000)}}),
        "are 1000000 at most, but some are named twice",
    ),
    "blocks beyond measure": (
        valid(version=2, blocks={"size": 10**11, "total": {"0": 2}, "kept": {}}),
        "no model has over",
    ),
    "hidden units beyond measure": (hidden({"total": {"0": 10**9}, "kept": {}}), "no model has over"),
    "heads as an object": (valid(kept={"0": {}}), "must be a list of numbers, but are {}"),
    "a layer of thousands of digits": (valid(kept={"1" * 5000: []}), "names layer '111"),
    "version as text": (valid(version="1"), "version '1'"),
    "version null": (valid(version=None), "version None"),
    "unknown key": (valid(heads={}), "unknown key 'heads'"),
    "unknown unit": (valid(unit="layer"), "must be 'head' or 'kv_group', but it is 'layer'"),
    "unit is a list": (valid(unit=["head"]), "must be 'head' or 'kv_group'"),
    "unit is null": (valid(unit=None), "must be 'head' or 'kv_group'"),
    "scale is a number": (valid(output_scale=1), "must be true or false"),
    "scale is null": (valid(output_scale=None), "must be true or false"),
    "kept is a list": (valid(kept=[[0]]), "must be JSON objects"),
    "total is a list": (valid(total=[4, 4]), "must be JSON objects"),
    "total is a number": (valid(total=4), "must be JSON objects"),
    "no layer": (valid(total={}, kept={}), "at least one layer"),
    "zero heads": (valid(total={"0": 0}, kept={}), "at least one head in all, but gives 0"),
    "minus heads": (valid(total={"0": -1}, kept={}), "at least one head in all"),
    "half heads": (valid(total={"0": 1.5}, kept={}), "at least one head in all"),
    "true heads": (valid(total={"0": True}, kept={}), "at least one head in all"),
    "count as text": (valid(total={"0": "4"}, kept={}), "at least one head in all"),
    "null heads": (valid(total={"0": None}, kept={}), "at least one head in all"),
    "unknown layer": (valid(kept={"2": [0]}), "names layer 2, but its totals have only: 0, 1"),
    "minus layer": (valid(kept={"-1": [0]}), "names layer '-1'"),
    "head too large": (valid(kept={"0": [4]}), "head 4 of layer 0, but its heads are numbered 0 to 3"),
    "minus head": (valid(kept={"0": [-1]}), "head -1 of layer 0"),
    "half a head": (valid(kept={"0": [0.5]}), "head 0.5 of layer 0"),
    "true as head": (valid(kept={"0": [True]}), "head True of layer 0"),
    "text as head": (valid(kept={"0": ["1"]}), "head '1' of layer 0"),
    "list as head": (valid(kept={"0": [[1]]}), r"head \[1\] of layer 0"),
    "null as head": (valid(kept={"0": [None]}), "head None of layer 0"),
    "head twice": (valid(kept={"0": [1, 1]}), "names a head of layer 0 twice"),
    "heads as text": (valid(kept={"0": "01"}), "must be a list of numbers"),
    "heads as number": (valid(kept={"0": 2}), "must be a list of numbers"),
    "heads null": (valid(kept={"0": None}), "must be a list of numbers"),
    "layer twice in kept": (valid(kept={"0": [1], "00": [2]}), "twice"),
    "layer twice in total": (valid(total={"0": 4, "00": 4}, kept={}), "twice"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD.keys())
def test_bad_plans_are_refused_in_one_sentence(values: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values))
    for read in (lambda: HeadPlan.from_dict(values), lambda: HeadPlan.from_json(path)):
        with pytest.raises(InputError, match=message) as caught:
            read()
        text = str(caught.value)
        assert "\n" not in text and text.endswith(".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "is not JSON"),
        (b'{"total": {', "is not JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "is not JSON"),
    ],
    ids=["missing", "empty", "cut short", "not text", "nested too deep"],
)
def test_files_that_hold_no_plan_are_refused_in_one_sentence(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        HeadPlan.from_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        HeadPlan.from_json(tmp_path)


@pytest.mark.parametrize("units", ["x", {"kept": {}, "total": {"0": 2}}, HeadPlan.keep_all({0: 2})], ids=str)
def test_hidden_units_of_another_type_are_refused(units: Any) -> None:
    with pytest.raises(InputError, match=r"plan's hidden_units must be UnitPlan \| None, but got .*"):
        HeadPlan(kept={}, total={0: 2}, hidden_units=units)


@pytest.mark.parametrize("layer", [9, "x", [1], None], ids=str)
def test_what_goes_of_a_layer_that_is_not_there(layer: Any) -> None:
    with pytest.raises(InputError, match="head plan has the layers 0, 1, but not |takes layer as int . str"):
        HeadPlan.keep_all({0: 2, 1: 2}).cut(layer)


def test_blocks_of_version_2_are_the_hidden_units_of_version_3() -> None:
    old = valid(version=2, blocks={"size": 3, "total": {"0": 4, "1": 4}, "kept": {"0": [0, 3], "1": []}})
    plan = HeadPlan.from_dict(old)
    assert plan.units[UnitKey("block", 0)] == (0, 1, 2, 9, 10, 11) and plan.units[UnitKey("block", 1)] == ()
    assert plan.to_dict()["version"] == 3
    assert plan.to_dict()["hidden_units"] == {"total": {"0": 12, "1": 12}, "kept": {"0": "0-2,9-11", "1": ""}}
    assert HeadPlan.from_dict(plan.to_dict()) == plan
    # A layer that is not named keeps all of its units.
    every = hidden({"total": {"0": 5, "1": 5}, "kept": {"1": "4,0-1"}})
    assert HeadPlan.from_dict(every).hidden_units.kept == {0: (0, 1, 2, 3, 4), 1: (0, 1, 4)}  # type: ignore[union-attr]


def test_version_2_without_blocks_is_read() -> None:
    assert HeadPlan.from_dict(valid(version=2, blocks=None)) == HeadPlan.from_dict(valid())


def test_a_head_of_more_digits_than_python_writes() -> None:
    with pytest.raises(InputError, match="keeps head a number of thousands of digits of layer 0"):
        HeadPlan.from_dict(valid(kept={"0": [16**5000]}))


def test_without_a_version_a_plan_is_read_as_the_first() -> None:
    values = valid()
    del values["version"], values["unit"]
    assert HeadPlan.from_dict(values) == HeadPlan.from_dict(valid())
