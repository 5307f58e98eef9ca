"""The cost model of a machine: what is measured becomes a sum over layers, is kept, refused elsewhere, and predicts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead.measure.latency
from benchmarks._tiny_models import tiny_model
from deadhead.attaching import attach, gates_of
from deadhead.errors import InputError
from deadhead.measure.latency import Latency, measure_latency
from deadhead.measure.timing import Timing
from deadhead.models.pruned.feed_forward import find_feed_forwards
from deadhead.models.pruned.structure import find_attentions
from tests import random_models
from tests.random_models import assert_unchanged, snapshot

# Seconds that each head and each hidden unit takes, and all else.
_HEAD, _UNIT, _REST = 0.03, 0.000625, 0.2


def _known(models: Mapping[str, Any], *, noise: float = 0.0, **how: Any) -> dict[str, Timing]:
    """Stand in for the clock: every unit takes a known time."""
    found = {}
    for index, (name, model) in enumerate(models.items()):
        assert gates_of(model) is None
        heads = sum(attention.num_kv_heads for attention in find_attentions(model)[0])
        units = sum(layer.width for layer in find_feed_forwards(model))
        seconds = _REST + _HEAD * heads + _UNIT * units + noise * (index % 2)
        found[name] = Timing(workload=how["workload"], seconds=seconds, tokens_per_second=1 / seconds)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadhead.measure.latency, "bench", _known)


@pytest.mark.usefixtures("clock")
def test_what_each_unit_takes_is_found_out_and_predicts_any_plan() -> None:
    model = tiny_model("llama")
    latency = measure_latency(model, hidden=True, repeats=1)
    costs = latency.costs()
    assert costs.total == pytest.approx(_REST + 12 * _HEAD + 24 * 8 * _UNIT) == latency.dense
    assert costs.fixed == pytest.approx(_REST)
    for key, table in costs.tables.items():
        each = _UNIT if key.kind == "block" else _HEAD
        assert table.tolist() == pytest.approx([each * count for count in range(len(table))])
    gates = attach(model, blocks=8)
    every = enumerate(gates.choices.units.items())
    plan = gates.choices.plan_of({key: units[: index % 4] for index, (key, units) in every})
    kept = sum(len(units) for key, units in plan.units.items() if key.kind == "head"), sum(plan.hidden_units.counts)  # type: ignore[union-attr]
    assert latency.predict(plan) == pytest.approx(_REST + _HEAD * kept[0] + _UNIT * kept[1])
    assert latency.speedup(plan) == pytest.approx(latency.dense / latency.predict(plan))
    assert latency.speedup(gates.plan()) == pytest.approx(1.0)


def test_noise_never_makes_more_units_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadhead.measure.latency, "bench", lambda models, **how: _known(models, noise=0.1, **how))
    costs = measure_latency(tiny_model("llama"), hidden=True, repeats=1).costs()
    for table in costs.tables.values():
        assert float(table[0]) == 0.0 and bool((table.diff() >= 0).all())
    assert costs.fixed > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "own"])
def test_a_real_clock_leaves_model_and_gates_alone(name: str) -> None:
    model: Any = random_models.tiny_model() if name == "own" else tiny_model(name)
    gates = attach(model)
    before, state = snapshot(model), copy.deepcopy(gates.state_dict())
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    latency = measure_latency(
        model,
        workload="decode",
        batch_size=1,
        length=4,
        new_tokens=2,
        repeats=1,
        progress=lambda *now: told.append(now),
    )
    assert_unchanged(model, before)
    assert all(torch.equal(value, state[key]) for key, value in gates.state_dict().items())
    assert told[0][0] == 0 and told[-1][0] == told[-1][1]
    assert set(latency.seconds) == {"heads"}
    assert latency.dense > 0 and latency.costs().total == pytest.approx(latency.dense)
    assert set(latency.units) == set(gates.choices.units)


@pytest.mark.usefixtures("clock")
def test_it_is_kept_and_refused_for_anything_else(tmp_path: Path) -> None:
    model = tiny_model("llama")
    latency = measure_latency(model, hidden=True, batch_size=2, length=16, repeats=1)
    latency.to_json(tmp_path / "latency.json")
    again = Latency.from_json(tmp_path / "latency.json")
    assert again == latency
    how: dict[str, Any] = {"unit": None, "hidden": True, "workload": "prefill", "batch_size": 2, "length": 16}
    again.require(model, **how)
    for name, value, word in [
        ("hidden", False, "units"),
        ("workload", "decode", "workload"),
        ("batch_size", 3, "batch size 2"),
        ("length", 17, "length 16"),
        ("unit", "head", "unit 'kv_group'"),
    ]:
        with pytest.raises(InputError, match=f"{word}.*delete latency.json"):
            again.require(model, **{**how, name: value})
    with pytest.raises(InputError, match="model type 'llama'"):
        again.require(tiny_model("mistral"), **how)
    with pytest.raises(InputError, match="dtype"):
        again.require(model.to(torch.float64), **how)


@pytest.mark.parametrize("change", ["{}", "[]", '{"device": 1}', "no JSON", "units"])
@pytest.mark.usefixtures("clock")
def test_a_file_that_holds_something_else_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    measure_latency(tiny_model("llama"), repeats=1).to_json(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "units": {"0": "many"}}) if change == "units" else change)
    with pytest.raises(InputError):
        Latency.from_json(path)
