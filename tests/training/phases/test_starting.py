"""Gates that begin where a criterion's scores are, in blocks of hidden units of like scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deadhead.plans.plan import HeadPlan
from deadhead.training import PhaseRun, PruneRecipe
from deadhead.training.phases import starting
from deadhead.training.phases.phase import choose_units
from deadhead.training.phases.ranking import rank
from tests.small_runs import KillAt, Killed, stream
from tests.training.phases.test_choosing import MODELS, row

TEXT = stream(600)


def recipe_of(name: str, **values: Any) -> PruneRecipe:
    """Return a phase of a few batches, of blocks of two units."""
    return PruneRecipe(**{"batch_size": 2, "block_size": 2, "params": 0.8, **row(name), **values})


def leaning(name: str, **values: Any) -> PruneRecipe:
    """Return the recipe of gates that lean by a criterion, and hardly move."""
    asked = {"start_from": "reconstruction", "start_batches": 2, "steps": 2, "gate_lr": 1e-9, "freeze_weights": True}
    return recipe_of(name, **{**asked, **values})


@pytest.mark.parametrize("name", ["llama", "gpt2", "transformer-xl"])
def test_gates_that_do_not_move_choose_what_the_ranking_chooses(name: str) -> None:
    ranked = rank(MODELS[name](), TEXT, recipe_of(name, criterion="reconstruction", steps=2))
    gates, _ = choose_units(MODELS[name](), TEXT, leaning(name), PhaseRun())
    found = gates.plan()
    assert ranked.hidden_units is not None and found.hidden_units is not None
    assert _kept_units(found) == _kept_units(ranked)
    # Neighbours would have been others.
    neighbours, _ = choose_units(MODELS[name](), TEXT, recipe_of(name, steps=2, freeze_weights=True), PhaseRun())
    assert gates.choices.hidden != neighbours.choices.hidden
    assert sorted(map(len, gates.choices.hidden.values())) == sorted(map(len, neighbours.choices.hidden.values()))


def _kept_units(plan: HeadPlan) -> dict[Any, tuple[int, ...]]:
    return {key: tuple(units) for key, units in plan.units.items()}


@pytest.mark.parametrize("how", [{"criterion": "reconstruction", "steps": 2}, {"start_from": "flap", "steps": 2}])
def test_progress_is_told_while_units_are_scored(how: dict[str, Any]) -> None:
    told: list[tuple[str, int, int]] = []
    recipe = recipe_of("llama", start_batches=2, freeze_weights=True, **how)
    choose_units(MODELS["llama"](), TEXT, recipe, PhaseRun(progress=lambda *found: told.append(found[:3])))
    assert told[:3] == [("scoring units", done, 2) for done in range(3)]
    assert told[3:] == ([("train", 1, 2), ("train", 2, 2)] if "start_from" in how else [])


def test_a_phase_that_goes_on_has_the_blocks_that_it_began_with(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = leaning("llama", steps=6, save_every=2, gate_lr=None)
    whole, _ = choose_units(MODELS["llama"](), TEXT, recipe, PhaseRun(folder=tmp_path / "whole"))
    run = PhaseRun(folder=tmp_path / "killed", callbacks=[KillAt(4)])
    with pytest.raises(Killed):
        choose_units(MODELS["llama"](), TEXT, recipe, run)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("units were scored anew, which another machine would do otherwise")

    monkeypatch.setattr(starting, "score_together", never)
    gates, _ = choose_units(MODELS["llama"](), TEXT, recipe, PhaseRun(folder=tmp_path / "killed", resume=True))
    assert gates.choices.members == whole.choices.members
    for (_, gate), (_, expected) in zip(gates, whole, strict=True):
        assert torch.equal(gate.log_alpha, expected.log_alpha)
    assert gates.plan() == whole.plan()
