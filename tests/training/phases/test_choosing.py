"""Budgets of real models: trained for a few steps, met exactly, saved, reloaded, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.errors import InputError
from deadhead.gates.budget import Budget
from deadhead.measure.cost import cost_of_kind, model_cost
from deadhead.plans.kinds import ONE_SHOT
from deadhead.training import PhaseRun, PruneRecipe, train
from deadhead.training.phases.choosing import asked_blocks, attach_gates, close_to_budget, true_share
from deadhead.training.phases.ranking import rank
from tests import random_models
from tests.models.test_transformer_xl import tiny as tiny_transformer_xl
from tests.small_runs import KillAt, Killed, stream

MODELS = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2"),
    "own": lambda: random_models.tiny_model(num_attention_heads=8, hidden_size=32),
    "transformer-xl": tiny_transformer_xl,
}


def recipe_of(**values: Any) -> PruneRecipe:
    """Return a phase of a few steps."""
    return PruneRecipe(**{"steps": 6, "batch_size": 2, "save_every": 2, "learning_rate": 1e-3, **values})


def row(name: str) -> dict[str, Any]:
    """Return the length of a row, for models that have no segments."""
    return {} if name in ("own", "transformer-xl") else {"sequence_length": 12}


@pytest.mark.parametrize(
    "budget",
    [{"params": 0.75}, pytest.param({"flops": 0.7}, marks=pytest.mark.slow), {"kv_cache": 0.5}, {"sparsity": 0.5}],
)
@pytest.mark.parametrize("name", MODELS)
def test_trained_gates_meet_the_budget_and_the_cut_model_has_that_cost(
    name: str, budget: dict[str, float], tmp_path: Path
) -> None:
    model = MODELS[name]()
    recipe = recipe_of(**row(name), **budget)
    ((kind, value),) = budget.items()
    gates = attach_gates(model, recipe)
    assert gates.choices.has_blocks == (kind in ("params", "flops") and name != "own")
    before = model_cost(model, unit=gates.unit, length=12)
    train(model, stream(600), recipe, PhaseRun(gates=gates))
    found = close_to_budget(model, gates, recipe)
    plan = gates.plan()
    deadhead.cut(model, plan)
    deadhead.save(model, tmp_path / "out")
    after = model_cost(deadhead.load(tmp_path / "out"), length=12)
    assert found is not None
    if kind == "sparsity":
        assert found == plan.sparsity == 0.5
        return
    kind_: Any = kind
    share = cost_of_kind(after, kind_) / cost_of_kind(before, kind_)
    if kind != "flops":  # counted at the length of a row there
        assert found == pytest.approx(share)
    assert 0.6 * value < found <= value


@pytest.mark.parametrize("budget", [{"params": 0.5}, {"flops": 0.6}])
def test_heads_and_blocks_that_own_the_same_numbers_use_a_budget_up(budget: dict[str, float]) -> None:
    model = random_models.tiny_model(num_attention_heads=8, hidden_size=32, num_persistent=32)
    recipe = recipe_of(**budget, blocks=True)
    gates = attach_gates(model, recipe)
    train(model, stream(600), recipe, PhaseRun(gates=gates))
    found = close_to_budget(model, gates, recipe)
    (value,) = budget.values()
    assert found is not None and value - 0.04 < found <= value
    before = model_cost(model).parameters
    deadhead.cut(model, gates.plan())
    assert "flops" in budget or model_cost(model).parameters / before == pytest.approx(found)


def test_single_query_heads_of_groups_meet_a_budget_that_their_sum_misses() -> None:
    model = tiny_model("llama")
    recipe = recipe_of(sequence_length=12, params=0.75, unit="head")
    gates = attach_gates(model, recipe)
    train(model, stream(600), recipe, PhaseRun(gates=gates))
    found = close_to_budget(model, gates, recipe)
    before = model_cost(model).parameters
    with pytest.warns(UserWarning, match="key/value cache grows") if _grows(model, gates) else _nothing():
        deadhead.cut(model, gates.plan())
    assert found is not None and found <= 0.75
    assert model_cost(model).parameters / before == pytest.approx(found)


def _grows(model: Any, gates: deadhead.HeadGates) -> bool:
    return model_cost(model, gates.plan()).kv_cache_bytes > model_cost(model).kv_cache_bytes


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("criterion", [*ONE_SHOT, "sizes"])
def test_rankings_meet_budgets_too(criterion: Any) -> None:
    model = tiny_model("llama")
    recipe = recipe_of(sequence_length=12, criterion=criterion, flops=0.6, steps=2)
    plan = rank(model, stream(600), recipe)
    share = true_share(model, recipe, plan)
    assert 0.5 < share <= 0.6
    assert plan.hidden_units is not None and (plan.hidden_units.sparsity > 0 or plan.sparsity > 0.5)


def test_what_is_asked_decides_whether_blocks_have_gates() -> None:
    llama, own = tiny_model("llama"), random_models.tiny_model()
    assert asked_blocks(recipe_of(flops=0.5), llama) is True
    assert asked_blocks(recipe_of(flops=0.5, block_size=4), llama) == 4
    assert asked_blocks(recipe_of(block_size=4), llama) == 4
    assert asked_blocks(recipe_of(flops=0.5, blocks=False), llama) is False
    assert asked_blocks(recipe_of(kv_cache=0.5), llama) is False
    assert asked_blocks(recipe_of(), llama) is False
    assert asked_blocks(recipe_of(params=0.5), own) is False
    assert asked_blocks(recipe_of(params=0.5), tiny_model("mixtral")) is False


def test_gates_and_recipe_must_agree_on_blocks() -> None:
    model = tiny_model("llama")
    gates = deadhead.attach(model)
    with pytest.raises(InputError, match="asks for gates on blocks, but those attached have none"):
        train(model, stream(600), recipe_of(sequence_length=12, flops=0.6), PhaseRun(gates=gates))


def test_a_phase_that_is_killed_goes_on_to_the_same_plan_and_weights(tmp_path: Path) -> None:
    recipe = recipe_of(sequence_length=12, params=0.7)

    def phase(folder: Path, *, resume: bool = False, kill: int | None = None) -> tuple[Any, deadhead.HeadPlan]:
        model = tiny_model("llama")
        gates = attach_gates(model, recipe, seed=3)
        callbacks = [] if kill is None else [KillAt(kill)]
        train(
            model,
            stream(600),
            recipe,
            PhaseRun(gates=gates, folder=folder, resume=resume, callbacks=callbacks, seed=3),
        )
        close_to_budget(model, gates, recipe)
        return model, gates.plan()

    whole, plan = phase(tmp_path / "whole")
    with pytest.raises(Killed):
        phase(tmp_path / "killed", kill=5)
    resumed, again = phase(tmp_path / "killed", resume=True)
    assert again == plan
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_share_of_the_blocks_leaves_embeddings_and_output_layer_out() -> None:
    model = tiny_model("llama")
    recipe = recipe_of(params=0.7, of="blocks", criterion="magnitude", block_size=1)
    plan = rank(model, None, recipe)  # type: ignore[arg-type]
    before, after = model_cost(model), model_cost(model, plan)
    left = (after.parameters - after.embedding_parameters) / (before.parameters - before.embedding_parameters)
    # A head is 4 % of them.
    assert 0.65 < left <= 0.7
    assert recipe.budget is not None and recipe.budget.words == {"kind": "params", "asked": 0.7, "of": "blocks"}
    with pytest.raises(ValidationError, match="of says what params is a share of"):
        recipe_of(flops=0.7, of="blocks")
    with pytest.raises(InputError, match="Only a budget of params can count the blocks' parameters alone"):
        Budget(kind="flops", value=0.7, of="blocks")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_memory_is_weights_and_the_cache_of_some_texts(name: str) -> None:
    model = MODELS[name]()
    before = model_cost(model, length=12)
    whole = 4 * before.parameters + 3 * before.kv_cache_bytes
    asked = round(0.8 * whole)
    recipe = recipe_of(**row(name), memory=f"{asked}B", criterion="magnitude", budget_batch_size=3)
    pruned = deadhead.prune(model, None, recipe=recipe, compensate=False)
    after = pruned.costs.after
    cache = model_cost(model, length=12).kv_cache_bytes
    assert pruned.budget == {"kind": "memory", "asked": asked, "reached": 4 * after.parameters + 3 * cache}
    assert 0.95 * asked < pruned.budget["reached"] <= asked
    with pytest.raises(InputError, match="leaves nothing to prune"):
        deadhead.prune(MODELS[name](), None, recipe=recipe_of(**row(name), memory="1GiB", criterion="magnitude"))
    with pytest.raises(InputError, match="memory 0.001 MiB cannot be reached"):
        deadhead.prune(MODELS[name](), None, recipe=recipe_of(**row(name), memory="1kB", criterion="magnitude"))


def test_memory_may_be_a_number_of_bytes() -> None:
    assert recipe_of(memory=700_000, criterion="flap").budget == Budget(kind="memory", value=700_000.0)
    with pytest.raises(ValidationError, match="a size such as 4GiB or 500MB was expected"):
        recipe_of(memory="much", criterion="flap")
