"""What a run's folder tells the page."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deadhead import HeadPlan, InputError
from deadhead.checkpoints import checkpoint
from deadhead.measure.cost import model_cost
from deadhead.report.run_facts import RunFacts, packed, sibling_points
from deadhead.training.callbacks.metrics import read_metrics
from deadhead.training.runs.summary import read_summary, write_summary
from tests.small_runs import tree


def _facts(folder: Path) -> RunFacts:
    facts = RunFacts(folder)
    assert facts.update()
    return facts


def test_facts_of_a_finished_run(small_run: Path) -> None:
    before = tree(small_run)
    found = _facts(small_run).facts
    plan = HeadPlan.from_json(small_run / "head_plan.json")
    lines = [line for line in read_metrics(small_run / "metrics.jsonl") if line["phase"] == "prune"]
    assert found["finished"]
    assert found["gates"]["steps"] == [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for layer in found["gates"]["layers"]:
        key = int(layer["key"])
        assert (layer["total"], layer["kept"], layer["what"]) == (plan.total[key], list(plan.kept[key]), "head")
        rows = np.frombuffer(base64.b64decode(layer["open"]), dtype=np.uint8).reshape(5, layer["total"]) / 255
        logged = np.array([line["open_probability"][layer["key"]] for line in lines])
        assert np.abs(rows - logged).max() <= 0.5 / 255 + 1e-9
        assert layer["difference"] == lines[-1]["output_difference"][layer["key"]]
    assert [(p["name"], p["begin"], p["done"], p["steps"]) for p in found["phases"]] == [
        ("train", 0, 3, 3),
        ("prune", 3, 5, 5),
        ("finetune", 8, 3, 3),
        ("control_prune", 3, 5, 5),
        ("control_finetune", 8, 3, 3),
    ]
    for stage, folder in (("dense", "dense"), ("finetuned", "pruned")):
        cost = model_cost(checkpoint.load(small_run / folder))
        assert found["costs"][stage]["kv_cache_bytes"] == cost.kv_cache_bytes
        assert found["costs"][stage]["parameters"] == cost.parameters == found["summary"][stage]["parameters"]
    assert [point["stage"] for point in found["points"]] == ["dense", "cut", "finetuned", "control"]
    assert tree(small_run) == before, "looking at a run changes nothing in it"


def test_a_run_that_measured_no_output_differences_shows_none(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "head_plan.json").write_bytes((small_run / "head_plan.json").read_bytes())
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("output_difference", None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gates = _facts(tmp_path).facts["gates"]
    assert gates["steps"] == [1, 2, 3, 4, 5]
    assert [layer["difference"] for layer in gates["layers"]] == [[], []]


def test_validation_is_among_the_curves(small_run: Path) -> None:
    phases = {phase["name"]: phase["scalars"] for phase in _facts(small_run).facts["phases"]}
    assert phases["prune"]["eval_perplexity"][0] == [2, 4, 5]
    assert phases["train"]["eval_perplexity"][0] == [2, 3]
    assert all(value > 1 for value in phases["prune"]["eval_perplexity"][1])


def test_nothing_new_is_not_read_again(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    facts = _facts(folder)
    assert not facts.update()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"phase": "finetune", "step": 4, "loss": 0.5}) + "\n")
    assert facts.update()
    assert facts.facts["phases"][2]["scalars"]["loss"][0][-1] == 4


def test_a_run_that_has_only_begun(small_run: Path, tmp_path: Path) -> None:
    shutil.copy(small_run / "recipe.toml", tmp_path)
    found = _facts(tmp_path).facts
    assert not found["finished"]
    assert (found["gates"], found["points"], found["costs"]) == ({"steps": [], "layers": []}, [], {})
    assert [phase["done"] for phase in found["phases"]] == [0] * 5


def test_gates_before_there_is_a_plan(small_run: Path, tmp_path: Path) -> None:
    shutil.copy(small_run / "metrics.jsonl", tmp_path)
    layers = _facts(tmp_path).facts["gates"]["layers"]
    assert [(layer["key"], layer["total"], layer["kept"]) for layer in layers] == [("0", 4, None), ("1", 4, None)]


def test_only_runs_on_the_same_text_stand_beside(small_run: Path, tmp_path: Path) -> None:
    for name in ("this", "same", "other"):
        (tmp_path / name).mkdir()
        for file in ("recipe.toml", "summary.json"):
            shutil.copy(small_run / file, tmp_path / name)
    summary = read_summary(tmp_path / "other")
    summary["data"]["sha256"] = "0" * 64
    write_summary(tmp_path / "other", summary)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    facts = _facts(tmp_path / "this")
    assert {point["run"] for point in sibling_points(facts)} == {"same"}
    assert sibling_points(facts, [tmp_path / "other"]) == []
    with pytest.raises(InputError, match="the folder of a run"):
        sibling_points(facts, [tmp_path / "broken"])


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        RunFacts(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither recipe\.toml nor metrics\.jsonl"):
        RunFacts(tmp_path)


def test_shares_as_bytes() -> None:
    values = np.array([0.0, 0.5, 1.0, np.nan, 2.0, -1.0])
    assert list(base64.b64decode(packed(values))) == [0, 128, 255, 0, 255, 0]
