"""Gates alone in a folder: what is written comes back, on the model it belongs to and on no other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead import GateConfig, InputError
from deadhead.checkpoints.gate_files import (
    GATES_CONFIG_FILE,
    GATES_FILE,
    has_gates,
    load_gates,
    load_gates_among_weights,
    save_gates,
)
from tests.small_runs import assert_same_tensors

_CONFIG = GateConfig(init=0.5, seed=3, output_scale=True, lr_scale=7.0)


def _saved(folder: Path, model_type: str = "llama", **attach: Any) -> deadhead.HeadGates:
    gates = deadhead.attach(tiny_model(model_type), config=_CONFIG, **attach)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, gate in gates:
            gate.log_alpha_bias.normal_()
    deadhead.checkpoints.gate_files.save_gates(gates, folder)
    return gates


@pytest.mark.parametrize("unit", ["head", "kv_group"])
def test_round_trip(unit: Any, tmp_path: Path) -> None:
    """Values, constants, unit and plan; the folder holds nothing of the model."""
    gates = _saved(tmp_path, unit=unit)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([GATES_FILE, GATES_CONFIG_FILE])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4096
    model = tiny_model("llama")
    loaded = deadhead.checkpoints.gate_files.load_gates(model, tmp_path)
    assert deadhead.gates_of(model) is loaded
    assert_same_tensors(loaded.state_dict(), gates.state_dict())
    assert (loaded.config, loaded.unit, loaded.plan()) == (_CONFIG, unit, gates.plan())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, gates: load_gates(model, 5), "load_gates takes path as .*, but got 5"),
        (lambda model, gates: load_gates(model, None), "load_gates takes path as .*, but got None"),
        (lambda model, gates: save_gates(None, "o"), "save_gates takes gates as HeadGates, but got None"),
        (
            lambda model, gates: save_gates(model, "o"),
            "save_gates takes gates as HeadGates, but got an object of type Llama",
        ),
        (lambda model, gates: save_gates(gates, 5), "save_gates takes path as .*, but got 5"),
    ],
)
def test_what_is_of_another_type_is_refused(
    call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = tiny_model("llama")
    gates = deadhead.attach(model)
    with pytest.raises(InputError, match=message):
        call(model, gates)
    assert not [*tmp_path.iterdir()]


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert not has_gates(tmp_path)
    _saved(tmp_path)
    _saved(tmp_path)
    assert has_gates(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_gated_checkpoint_holds_the_same_files(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    gates = deadhead.attach(model, config=_CONFIG)
    deadhead.save(model, tmp_path / "model")
    deadhead.checkpoints.gate_files.save_gates(gates, tmp_path / "gates")
    for name in (GATES_FILE, GATES_CONFIG_FILE):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "gates" / name).read_bytes()


def test_gates_of_older_checkpoints_name_no_unit(tmp_path: Path) -> None:
    gates = _saved(tmp_path, "gpt2")
    values = json.loads((tmp_path / GATES_CONFIG_FILE).read_text())
    del values["unit"]
    (tmp_path / GATES_CONFIG_FILE).write_text(json.dumps(values))
    assert deadhead.checkpoints.gate_files.load_gates(tiny_model("gpt2"), tmp_path).plan() == gates.plan()


def test_gates_of_older_checkpoints_have_blocks_of_one_size(tmp_path: Path) -> None:
    gates = _saved(tmp_path, blocks=6)
    values = json.loads((tmp_path / GATES_CONFIG_FILE).read_text())
    del values["blocks"]
    (tmp_path / GATES_CONFIG_FILE).write_text(json.dumps(values | {"block_size": 6}))
    assert load_gates(tiny_model("llama"), tmp_path).plan() == gates.plan()


@pytest.mark.parametrize("size", [None, 6])
def test_older_gates_among_weights_have_blocks_of_one_size(size: int | None, tmp_path: Path) -> None:
    model = tiny_model("llama")
    gates = deadhead.attach(model, blocks=size or False)
    gates.set_plan(gates.plan(sparsity=0.5))
    for _, gate in gates:
        gate.settings.pop("blocks", None)
        gate.settings["block_size"] = size
    model.save_pretrained(tmp_path)
    assert load_gates_among_weights(tiny_model("llama"), tmp_path).plan() == gates.plan()


def test_blocks_among_weights_that_are_no_mapping(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for _, gate in deadhead.attach(model, blocks=True):
        gate.settings["blocks"] = ["0-3"]
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="must have blocks by layer if any"):
        load_gates_among_weights(tiny_model("llama"), tmp_path)


def _unknown_key(folder: Path) -> None:
    values = json.loads((folder / GATES_CONFIG_FILE).read_text())
    (folder / GATES_CONFIG_FILE).write_text(json.dumps(values | {"colour": 3}))


def _values(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / GATES_CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _not_finite(folder: Path) -> None:
    values = load_file(folder / GATES_FILE)
    next(iter(values.values())).fill_(math.nan)
    save_file(values, folder / GATES_FILE)


def _cut_short(folder: Path) -> None:
    path = folder / GATES_FILE
    path.write_bytes(path.read_bytes()[:-7])


def _one_missing(folder: Path) -> None:
    values = load_file(folder / GATES_FILE)
    del values[next(iter(values))]
    save_file(values, folder / GATES_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / GATES_FILE).unlink(), "Gates were expected in .*, but there is no head_gates.safet"),
        (lambda folder: (folder / GATES_CONFIG_FILE).unlink(), "head_gates.json"),
        (lambda folder: (folder / GATES_CONFIG_FILE).write_text("[1]"), "gate configuration"),
        (_unknown_key, "has an unknown key 'colour'"),
        (_cut_short, "are damaged or cut short"),
        (_one_missing, "The saved gates do not fit this model"),
        (_not_finite, "that are not finite numbers"),
        (lambda folder: (folder / GATES_CONFIG_FILE).write_text(""), "is not JSON"),
        (lambda folder: (folder / GATES_CONFIG_FILE).write_text("[" * 10**5), "nested too deep"),
        (lambda folder: (folder / GATES_FILE).write_bytes(b"\0" * 20), "are damaged or cut short"),
        (lambda folder: (folder / GATES_FILE).write_bytes(b"\xff" * 20), "are damaged or cut short"),
        (lambda folder: (folder / GATES_FILE).write_bytes(b""), "are damaged or cut short"),
        (_values(beta="a"), "must give beta a value like 0.3"),
        (_values(beta=True), "must give beta a value like 0.3"),
        (_values(beta=-1.0), "beta must be above 0"),
        (_values(beta=10**400), "must give beta a value like"),
        (_values(gamma=0.0), "gamma must be below 0"),
        (_values(zeta=1e300), "must give zeta a value"),
        (_values(zeta=1e9), "zeta must be above 1 and at most 1000"),
        (_values(init=-1e9), "init must be at most 1000 from 0"),
        (_values(epsilon=0.5), "epsilon must be between 0 and 0.5"),
        (_values(lr_scale=0), "lr_scale must be above 0"),
        (_values(hard=1), "must give hard a value like True"),
        (_values(seed=0.5), "must give seed a value like 0"),
        (_values(unit="layer"), "must have a unit, head or kv_group"),
        (_values(unit=["head"]), "must have a unit, head or kv_group"),
        (_values(blocks="all"), "blocks by layer if any"),
        (_values(blocks={"0": "0-3"}), "must be a list of ranges"),
        (_values(blocks={"0": ["0-x"]}), "must be ranges, such as"),
        (_values(blocks={"7": ["0-3"]}), "Blocks were given for layer 7"),
        (_values(blocks={"0": ["0-3", "3-47"]}), "3 is in two blocks"),
        (_values(blocks={"0": ["0-3"]}), "4 is in none"),
        (_values(blocks={"0": ["0-900"]}), "is not one of this layer"),
        (_values(block_size="all"), "must have a number as block_size"),
        (_values(block_size=6), "The saved gates do not fit this model"),
    ],
)
def test_damage_is_said_in_one_sentence_and_nothing_stays_attached(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    _saved(tmp_path)
    damage(tmp_path)
    model = tiny_model("llama")
    with pytest.raises(InputError, match=message) as caught:
        deadhead.checkpoints.gate_files.load_gates(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert deadhead.gates_of(model) is None


@pytest.mark.parametrize("other", ["gpt2", "jamba"])
def test_gates_of_another_model_are_refused(other: str, tmp_path: Path) -> None:
    _saved(tmp_path)
    model = tiny_model(other)
    with pytest.raises(InputError) as caught:
        deadhead.checkpoints.gate_files.load_gates(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert deadhead.gates_of(model) is None
