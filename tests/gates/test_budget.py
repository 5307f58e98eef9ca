"""Budgets: what may be asked for, gates that are held at one, and plans that meet it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.errors import InputError
from deadhead.gates.budget import Budget, BudgetTarget, plan_within
from deadhead.gates.gates import HeadGates
from deadhead.gates.penalty import SparsityTarget
from deadhead.measure.cost import counted_costs, model_cost
from deadhead.plans.kinds import BUDGET_KINDS
from deadhead.plans.plan import UnitKey
from deadhead.plans.scores import HeadScores
from deadhead.plans.unit_costs import UnitCosts
from deadhead.report.tables import budget_sentence
from tests.random_models import choices_among

_KEY = UnitKey("head", 0)


def gated() -> tuple[Any, HeadGates]:
    """Return a tiny Llama with gates on 3 × 4 groups and 3 × 8 blocks."""
    model = tiny_model("llama")
    return model, deadhead.attach(model, blocks=8)


def costs_of(model: Any, gates: HeadGates, kind: Any = "params") -> UnitCosts:
    """Return what its units cost."""
    return counted_costs(model, kind, unit=gates.unit, hidden=gates.choices.has_blocks)


def scatter(gates: HeadGates, seed: int) -> None:
    """Give every gate an opinion."""
    generator = torch.Generator().manual_seed(seed)
    for _, gate in gates:
        gate.set_log_alpha(torch.randn(gate.num_heads, generator=generator) * 2)


@pytest.mark.parametrize(
    ("kind", "value", "share"),
    [("sparsity", 0.25, 0.75), ("params", 0.6, 0.6), ("flops", 1.0, 1.0), ("kv_cache", 0.5, 0.5), ("speedup", 4, 0.25)],
)
def test_shares_and_what_is_reached_are_in_the_budgets_own_terms(kind: Any, value: float, share: float) -> None:
    budget = Budget(kind=kind, value=value)
    assert budget.share == share
    assert budget.reached(share) == value


def test_memory_is_in_bytes_once_it_is_known_what_the_model_takes() -> None:
    budget = Budget(kind="memory", value=3.0 * 2**30, whole=4.0 * 2**30)
    assert (budget.share, budget.reached(0.5)) == (0.75, 2.0 * 2**30)
    assert budget.words == {"kind": "memory", "asked": 3.0 * 2**30}
    costs = UnitCosts(fixed=3.5 * 2**30, tables={UnitKey("head", 0): torch.tensor([0.0, 0.5 * 2**30])})
    with pytest.raises(InputError, match="budget memory 3.000 GiB cannot be reached: without .* be at 3.500 GiB"):
        budget.require_reachable(costs, has_blocks=True)
    with pytest.raises(InputError, match="budget memory 4.000 GiB leaves nothing to prune: the model takes 4.000 GiB"):
        Budget(kind="memory", value=4.0 * 2**30, whole=4.0 * 2**30).require_reachable(costs, has_blocks=True)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("params", 0.0),
        ("flops", 1.01),
        ("kv_cache", math.nan),
        ("speedup", 0.9),
        ("memory", 0.0),
    ],
)
def test_values_out_of_range_are_refused(kind: Any, value: float) -> None:
    with pytest.raises(InputError, match=f"budget of {kind} must be"):
        Budget(kind=kind, value=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(kind="bytes", value=0.5), "A budget's kind must be .*'params'.*, but got 'bytes'"),  # type: ignore[arg-type]
        (lambda: Budget(kind="params", value="a"), "A budget's value must be float, but got 'a'"),  # type: ignore[arg-type]
        (lambda: Budget(kind="params", value=True), "A budget's value must be float, but got True"),
        (lambda: BudgetTarget("params", 0.5), "BudgetTarget takes costs as UnitCosts, but got 'params'"),  # type: ignore[arg-type]
        (lambda: SparsityTarget("half"), "SparsityTarget takes sparsity as float, but got 'half'"),  # type: ignore[arg-type]
        (lambda: SparsityTarget(0.5, ramp_steps=True), "takes ramp_steps as int .*, but got True"),
    ],
)
def test_what_is_of_another_type_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    costs = UnitCosts(fixed=4.0, tables={_KEY: torch.tensor([0.0, 3.0, 6.0])})
    Budget(kind="params", value=0.4).require_reachable(costs, has_blocks=False)
    with pytest.raises(InputError, match=r"params 0.3 cannot be reached: without any heads .* 0.400.*add blocks"):
        Budget(kind="params", value=0.3).require_reachable(costs, has_blocks=False)
    with pytest.raises(InputError, match=r"speedup 3 cannot be reached: without any heads and blocks .* 2.500"):
        Budget(kind="speedup", value=3).require_reachable(costs, has_blocks=True)


@pytest.mark.parametrize("kind", ["params", "flops", "kv_cache"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_the_ramp_holds_the_expected_cost(kind: str, share: float) -> None:
    model, gates = gated()
    scatter(gates, 0)
    costs = costs_of(model, gates, kind)
    share = max(share, costs.fixed / costs.total + 0.05)
    target = BudgetTarget(costs, share, ramp_steps=10)
    begun = max(target.expected(gates) / costs.total, share)
    for step in range(1, 13):
        target.project(gates, step)
        wanted = begun + (share - begun) * min(1.0, step / 10)
        assert target.expected(gates) / costs.total == pytest.approx(wanted, abs=1e-5)


def test_of_two_units_with_one_opinion_the_dearer_goes_first() -> None:
    _, gates = gated()
    most = {"head": 40.0, "block": 1.0}
    tables = {key: torch.linspace(0, most[key.kind], len(units) + 1) for key, units in gates.choices.units.items()}
    costs = UnitCosts(fixed=0.0, tables=tables)
    BudgetTarget(costs, 0.5, ramp_steps=1).project(gates, 1)
    assert gates.sparsity == 1.0 and gates.block_sparsity == 0.0


def test_what_costs_nothing_stays_where_it_is() -> None:
    model, gates = gated()
    scatter(gates, 3)
    before = {key: gate.log_alpha.clone() for key, gate in gates}
    costs = costs_of(model, gates, "kv_cache")
    BudgetTarget(costs, 0.3, ramp_steps=1).project(gates, 1)
    for key, gate in gates:
        assert torch.equal(gate.log_alpha, before[key].clamp(-6, 6)) == (key.kind == "block")


def test_the_output_difference_weighs_too() -> None:
    model, gates = gated()
    for _, gate in gates:
        gate.difference.copy_(torch.arange(gate.num_heads) / gate.num_heads + 0.1)
    BudgetTarget(costs_of(model, gates), 0.5, ramp_steps=1).project(gates, 1, "output_difference")
    for _, gate in gates:
        assert bool((gate.log_alpha.diff() > 0).all()), (
            "the less a unit changes its layer's output, the harder it is pushed"
        )


def test_a_target_goes_on_where_it_was_saved() -> None:
    model, gates = gated()
    costs = costs_of(model, gates)
    target = BudgetTarget(costs, 0.5, ramp_steps=10)
    target.project(gates, 3)
    again = BudgetTarget(costs, 0.5, ramp_steps=10)
    again.load_state(target.state())
    assert again.wanted(7, gates) == target.wanted(7, gates)
    with pytest.raises(InputError, match="above 0 and at most 1"):
        BudgetTarget(costs, 0.0, ramp_steps=10)


_MODEL, _GATES = gated()
_COSTS = {kind: costs_of(_MODEL, _GATES, kind) for kind in ("params", "flops", "kv_cache")}


@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 6),
    ramp=st.none() | st.integers(0, 20),
    kind=st.sampled_from(["params", "flops", "kv_cache"]),
    part=st.floats(0.0, 1.0),
    weighting=st.sampled_from(["plain", "output_difference"]),
)
@settings(deadline=None, max_examples=30)
def test_a_training_ends_within_its_budget(
    seed: int, steps: int, ramp: int | None, kind: Any, part: float, weighting: Any
) -> None:
    """What stays open costs no more than was asked for, what else there is would be too much, and it is said so."""
    costs, gates = _COSTS[kind], _GATES
    least = costs.fixed / costs.total
    share = max(least + part * (1 - least), 1e-6)
    scatter(gates, seed)
    target = BudgetTarget(costs, share, ramp_steps=ramp)
    target.begin(gates, steps)
    for step in range(1, steps + 1):
        target.project(gates, step, weighting, is_last=step == steps)
    plan = gates.plan()
    assert plan == target.plan(gates) and target.shortfall(gates) == ""
    counts = {key: len(units) for key, units in plan.units.items()}
    assert costs.of(counts) <= max(share * costs.total, costs.fixed)
    assert model_cost(_MODEL, plan).parameters <= share * costs.total * (1 + 1e-6) or kind != "params"
    for key, gate in gates:
        if not bool(gate.is_open.all()):
            one_more = {**counts, key: counts[key] + len(gates.choices.members[key][0])}
            assert costs.of(one_more) > share * costs.total


def test_a_budget_out_of_reach_and_costs_of_others_are_refused() -> None:
    model, gates = gated()
    costs = costs_of(model, gates)
    with pytest.raises(InputError, match=r"A share of 0.01 of the cost cannot be reached: without any of its units"):
        BudgetTarget(costs, 0.01)
    heads = deadhead.attach(tiny_model("llama"))
    with pytest.raises(InputError, match="costs are of 204 units in 6 places, but the model's gates are on 12 in 3"):
        BudgetTarget(costs, 0.7).begin(heads, 10)
    said = BudgetTarget(costs, 0.7).shortfall(gates)
    assert said == "leave 1 of the cost, but 0.7 was asked for; callback.target.plan(gates) is within that"


@given(seed=st.integers(0, 10**6), share=st.floats(0.3, 1.0))
@settings(deadline=None, max_examples=60)
def test_plans_use_a_budget_up_and_never_exceed_it(seed: int, share: float) -> None:
    draw = random.Random(seed)
    keys = [UnitKey(kind, layer) for kind in ("head", "block") for layer in range(2)]
    sizes = {key: draw.randint(1, 6) for key in keys}
    steps = {key: torch.tensor([draw.uniform(0.1, 5.0) for _ in range(size)]) for key, size in sizes.items()}
    costs = UnitCosts(
        fixed=1.0, tables={k: torch.cat([torch.zeros(1), s]).cumsum(0).double() for k, s in steps.items()}
    )
    scores = HeadScores(
        scores={key: torch.tensor([draw.gauss(0, 1) for _ in range(size)]) for key, size in sizes.items()},
        choices=choices_among(sizes),
    )
    limit = share * costs.total
    kept = scores.within(costs, limit).units
    counts = {key: len(units) for key, units in kept.items()}
    if limit >= costs.fixed:
        assert costs.of(counts) <= limit + 1e-9
    for key, units in kept.items():
        gone = [unit for unit in range(sizes[key]) if unit not in units]
        # Of a layer the best stay: their prices are those of the layer's number.
        assert (
            not gone
            or not units
            or min(float(scores.scores[key][unit]) for unit in units)
            >= max(float(scores.scores[key][unit]) for unit in gone)
        )
        if gone:
            assert costs.of({**counts, key: counts[key] + 1}) > limit - 1e-9, "what still fits stays"


def test_heads_that_must_go_go_whatever_the_budget() -> None:
    costs = UnitCosts(fixed=0.0, tables={_KEY: torch.tensor([0.0, 1.0, 2.0])})
    values = {_KEY: torch.tensor([-math.inf, 1.0])}
    scores = HeadScores(scores=values, choices=choices_among({_KEY: 2}))
    assert scores.within(costs, 10.0).kept == {0: (1,)}


def test_a_true_cost_above_the_sum_makes_the_plan_smaller() -> None:
    model, gates = gated()
    scatter(gates, 5)
    costs = costs_of(model, gates)
    dense = model_cost(model).parameters

    def true(plan: deadhead.HeadPlan) -> float:
        # As if each unit that goes left a tenth of itself behind.
        share = model_cost(model, plan).parameters / dense
        return share + 0.1 * (1 - share)

    plan, found = plan_within(gates.scores(), costs, 0.6, true)
    assert found == true(plan) and 0.55 < found <= 0.6
    plain, _ = plan_within(gates.scores(), costs, 0.6, lambda plan: model_cost(model, plan).parameters / dense)
    assert sum(plan.heads) + sum(plan.hidden_units.counts) < sum(plain.heads) + sum(plain.hidden_units.counts)  # type: ignore[union-attr]


def test_every_kind_has_a_sentence() -> None:
    sentences = [budget_sentence({"kind": kind, "asked": 2, "reached": 2.0}) for kind in BUDGET_KINDS]
    assert len(set(sentences)) == len(BUDGET_KINDS)
