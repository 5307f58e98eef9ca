"""Learned sizes: the descent against a known optimum, what it does to a model, and what it leaves of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deadhead.criteria.scoring import score_heads
from deadhead.criteria.sizes import SizesCourse, _Descent
from deadhead.errors import InputError
from deadhead.measure.cost import counted_costs
from deadhead.measure.losses import SegmentLoss
from deadhead.plans.plan import Unit, UnitKey
from deadhead.plans.unit_costs import UnitCosts
from tests.criteria.models import MODELS, STOCK, batches, llama, scored_batches
from tests.random_models import difference, tiny_model

WORTH = {0: 4.0, 1: 1.0, 2: 2.0}
UNITS = {0: 10, 1: 20, 2: 40}


def costs_of(model: Any, unit: Unit, *, hidden: bool = True) -> UnitCosts:
    return counted_costs(model, "params", unit=unit, hidden=hidden, length=9, of="blocks")


def test_the_descent_comes_to_rest_where_all_give_alike_for_what_they_cost() -> None:
    """A sublayer of n units at s loses worth · n · ½ (1 − s / n)², of which a unit costs 1, 2 or 3."""
    keys = {layer: UnitKey("block", layer) for layer in WORTH}
    costs = UnitCosts(
        fixed=7.0,
        tables={key: (1.0 + layer) * torch.arange(UNITS[layer] + 1).double() for layer, key in keys.items()},
    )
    limit = 7.0 + 0.6 * (costs.total - 7.0)
    begin = {key: 0.5 * UNITS[layer] for layer, key in keys.items()}
    descent = _Descent(costs, limit, begin, {key: UNITS[layer] for layer, key in keys.items()}, 300)
    for _ in range(300):
        sizes = descent.sizes
        assert costs.of(sizes) == pytest.approx(limit)
        descent.step({key: -WORTH[layer] * (1 - sizes[key] / UNITS[layer]) for layer, key in keys.items()})
    found = descent.found
    gains = [WORTH[layer] * (1 - found[key] / UNITS[layer]) / (1 + layer) for layer, key in keys.items()]
    assert gains == pytest.approx([sum(gains) / 3] * 3, rel=0.02)
    assert costs.of(found) == pytest.approx(limit)


def test_gradients_that_are_not_finite_move_nothing() -> None:
    keys = [UnitKey("head", 0), UnitKey("head", 1)]
    costs = UnitCosts(fixed=0.0, tables={key: torch.arange(5).double() for key in keys})
    descent = _Descent(costs, 4.0, dict.fromkeys(keys, 2.0), dict.fromkeys(keys, 4), 10)
    descent.step({keys[0]: math.nan, keys[1]: -1.0})
    assert descent.sizes == pytest.approx(dict.fromkeys(keys, 2.0))
    descent.step({keys[0]: -2.0, keys[1]: -1.0})
    assert descent.sizes[keys[0]] > 2 > descent.sizes[keys[1]]


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("share", [0.85, 0.5])
def test_a_plan_of_learned_sizes_keeps_to_the_budget(name: str, share: float) -> None:
    make, unit = STOCK[name]
    model = make()
    costs = costs_of(model, unit)
    told: list[tuple[float, ...]] = []

    def note(*at: float) -> None:
        told.append(at)

    course = SizesCourse(model, scored_batches(), costs, unit=unit, blocks=4, progress=note)
    assert told == [(1, 2), (2, 2)] and course.batches == 2
    learned = course.learn(share, 6, progress=note)
    assert told[2:] == [*enumerate(learned.divergences, 1)] and len(learned.divergences) == 6
    plan = learned.scores.within(costs, share * costs.total)
    left = costs.of({key: len(plan.units[key]) for key in costs.tables}) / costs.total
    assert share - 0.1 < left <= share + 1e-9


def test_a_sublayer_that_gives_nothing_to_the_output_goes_first() -> None:
    """The last feed-forward part writes to a direction that the norm behind it takes for nothing."""
    model = llama()
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[1:] = 0
        model.model.norm.weight[0] = 0
    costs = costs_of(model, "kv_group")
    learned = SizesCourse(model, scored_batches(), costs, blocks=4).learn(0.7, 30)
    kept = learned.scores.within(costs, 0.7 * costs.total).units
    ranked = score_heads(model, "reconstruction", scored_batches(), blocks=4).over(costs)
    by_ranking = ranked.within(costs, 0.7 * costs.total).units
    last = UnitKey("block", 1)
    # Of what the norm does not see a ranking by each sublayer's own error knows nothing.
    assert len(kept[last]) < len(by_ranking[last])
    assert sum(learned.divergences[-8:]) < sum(learned.divergences[:8])


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_as_before(name: str) -> None:
    make, unit = MODELS[name]
    model = make()
    own = name == "all-attention"
    text = batches(2) if own else scored_batches()
    with torch.no_grad():
        before = SegmentLoss(model)(model, text[0]).loss
    state = {key: value.clone() for key, value in model.state_dict().items()}
    next(model.parameters()).requires_grad_(False)
    learns = {key: (id(parameter), parameter.requires_grad) for key, parameter in model.named_parameters()}
    model.train()
    costs = costs_of(model, unit, hidden=not own)
    SizesCourse(model, text, costs, unit=unit, blocks=False if own else 4).learn(0.8, 3)
    assert model.training
    model.eval()
    assert learns == {key: (id(parameter), parameter.requires_grad) for key, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert difference(SegmentLoss(model)(model, text[0]).loss, before) == 0


def test_sizes_are_not_learned_of_persistent_vectors_or_without_text() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="Persistent vectors have no sizes"):
        SizesCourse(model, batches(), costs_of(model, "head"), blocks=True)
    adaptive = tiny_model(adaptive_cutoffs=[7, 15], adaptive_factor=2)
    with pytest.raises(InputError, match="an adaptive softmax does not compute"):
        SizesCourse(adaptive, batches(), costs_of(adaptive, "head", hidden=False))
    with pytest.raises(InputError, match="got no batch"):
        SizesCourse(llama(), [], costs_of(llama(), "kv_group"), blocks=True)


def test_a_second_budget_goes_on_from_the_first_by_the_same_text() -> None:
    model = llama()
    costs = costs_of(model, "kv_group")
    course = SizesCourse(model, scored_batches(), costs, blocks=4)
    first = course.learn(0.8, 12)
    kept = first.scores.within(costs, 0.8 * costs.total).units
    start = {key: float(len(kept[key])) for key in costs.tables}
    then = course.learn(0.6, 12, start=start)
    # What the first one learned does not matter to a course of its own.
    again = SizesCourse(model, scored_batches(), costs, blocks=4).learn(0.6, 12, start=start)
    assert then.divergences == again.divergences
    assert all(torch.equal(scores, again.scores.scores[key]) for key, scores in then.scores.scores.items())
    assert then.divergences != course.learn(0.6, 12).divergences
