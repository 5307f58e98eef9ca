"""Second-order removal: moments against sums token by token, removal against least squares."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import deadhead
from deadhead.criteria.reading import WholeReading
from deadhead.criteria.scoring import score_heads
from deadhead.criteria.second_order import Moments, measured, removal, second_order, slopes
from deadhead.errors import InputError
from deadhead.measure.cost import counted_costs, model_cost
from deadhead.plans.plan import Unit, UnitKey
from tests.criteria.models import STOCK, counted, llama, scored_batches, seen, sites_of, streams, sublayer, weight_of


@pytest.fixture(params=STOCK)
def case(request: Any) -> tuple[Any, Unit]:
    make, unit = STOCK[request.param]
    return make().double(), unit


def problem(seed: int, features: int = 12, width: int = 5) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of features that depend on one another."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, 8, generator=draw, dtype=torch.float64)
    rows = rows @ torch.randn(8, features, generator=draw, dtype=torch.float64)
    rows += 0.3 * torch.randn(40, features, generator=draw, dtype=torch.float64)
    return torch.randn(width, features, generator=draw, dtype=torch.float64), rows.T @ rows / 40


def least_squares(weight: Tensor, moments: Tensor, staying: list[int], ridge: float) -> float:
    """The least of tr((W − V) C (W − V)ᵀ) for V with nothing but the columns that stay; C with its ridge."""
    damped = moments + ridge * moments.diagonal().diag()
    best = torch.zeros_like(weight)
    if staying:
        best[:, staying] = torch.linalg.solve(damped[staying][:, staying], (weight @ damped)[:, staying].T).T
    return float(((weight - best) @ damped @ (weight - best).T).trace())


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_moments_are_sums_over_the_tokens_that_count(name: str, with_gradients: bool) -> None:
    make, unit = STOCK[name]
    model = make().double().requires_grad_(not with_gradients)
    sites = sites_of(model, unit)
    found = measured(WholeReading(model, scored_batches()), sites, with_gradients=with_gradients)
    for site, moments in zip(sites, found, strict=True):
        inputs_nn, gradients_DD, count = torch.zeros(()).double(), torch.zeros(()).double(), 0
        for batch in scored_batches():
            inputs, output, loss, _ = seen(model, site, batch)
            (gradient,) = torch.autograd.grad(loss * int(counted(batch).sum()), [output])
            stream = streams(model, batch)[sublayer(site) + 1]
            for row, place in counted(batch).nonzero().tolist():
                square = stream[row, place].square().sum()
                inputs_nn = inputs_nn + torch.outer(inputs[row, place], inputs[row, place]) / square
                gradients_DD = gradients_DD + torch.outer(gradient[row, place], gradient[row, place]) * square
                count += 1
        assert moments.count == count
        torch.testing.assert_close(moments.inputs_nn.double(), inputs_nn, rtol=1e-3, atol=1e-4)
        assert (moments.gradients_DD is not None) == with_gradients
        if moments.gradients_DD is not None:
            torch.testing.assert_close(
                moments.gradients_DD.double(), gradients_DD, rtol=1e-3, atol=1e-4 * float(gradients_DD.abs().max())
            )


@pytest.mark.parametrize("width", [1, 3])
def test_each_removal_costs_what_least_squares_lose(width: int) -> None:
    weight, moments = problem(0)
    order, costs = removal(weight, moments, width, ridge=0.01)
    units = len(order)
    staying = list(range(units))
    before = 0.0
    for unit, cost in zip(order.tolist(), costs.tolist(), strict=True):
        lost = {}
        for candidate in staying:
            rest = [u * width + e for u in staying if u != candidate for e in range(width)]
            lost[candidate] = least_squares(weight, moments, rest, 0.01) - before
        assert unit == min(lost, key=lost.__getitem__)
        assert cost == pytest.approx(lost[unit], rel=1e-6)
        before += cost
        staying.remove(unit)
    assert before == pytest.approx(least_squares(weight, moments, [], 0.01))


def test_several_at_once_cost_what_least_squares_lose_of_all() -> None:
    weight, moments = problem(1)
    order, costs = removal(weight, moments, 1, ridge=0.01, steps=3)
    for end in (4, 8, 12):
        staying = order[end:].sort().values.tolist()
        assert float(costs[:end].sum()) == pytest.approx(least_squares(weight, moments, staying, 0.01), rel=1e-6)


def test_a_unit_that_a_smaller_scale_hides_is_removed_alike() -> None:
    weight, moments = problem(2)
    scale = torch.linspace(0.1, 10, 12, dtype=torch.float64)
    order, costs = removal(weight, moments, 1, ridge=0.01)
    same_order, same_costs = removal(weight / scale, scale[:, None] * moments * scale, 1, ridge=0.01)
    assert torch.equal(order, same_order)
    torch.testing.assert_close(costs, same_costs)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_scores_ascend_in_the_order_of_removal_and_sum_to_what_is_lost(with_gradients: bool) -> None:
    model = llama().double()
    for site in sites_of(model, "kv_group"):
        (moments,) = measured(WholeReading(model, scored_batches()), [site], with_gradients=with_gradients)
        scores = slopes(site, moments)
        if moments.gradients_DD is None:
            root = torch.eye(32, dtype=torch.float64)
        else:
            values, vectors = torch.linalg.eigh(moments.gradients_DD.double() / moments.count / 2)
            root = vectors * values.clamp(min=0).sqrt()
        weight, inputs = root.T @ weight_of(site), moments.inputs_nn.double() / moments.count
        order, costs = removal(weight, inputs, site.unit_dim, ridge=0.01)
        assert scores.argsort(stable=True).tolist() == order.tolist()
        assert float(scores.sum()) == pytest.approx(float(costs.sum()), rel=1e-5)
        whole = least_squares(weight, inputs, [], 0.01)
        assert float(scores.sum()) == pytest.approx(whole, rel=1e-5)
        # The slopes lie below the curve, and touch it at both ends.
        assert bool((scores[order].cumsum(0) <= costs.cumsum(0) * (1 + 1e-6)).all())
        assert all(one <= other for one, other in pairwise(scores[order].tolist()))


@pytest.mark.parametrize("how", ["never active", "never read"])
@pytest.mark.parametrize("criterion", ["second-order", "reconstruction"])
def test_a_dead_unit_scores_0(how: str, criterion: Any) -> None:
    model = llama()
    layer = model.model.layers[1].mlp
    with torch.no_grad():
        if how == "never active":
            layer.up_proj.weight[7] = 0
        else:
            layer.down_proj.weight[:, 7] = 0
    found = score_heads(model, criterion, scored_batches(), blocks=1)
    key = UnitKey("block", 1)
    # Blocks of one, the lowest score first.
    assert found.choices.members[key][0] == (7,)
    assert float(found.scores[key][0]) == pytest.approx(0, abs=1e-12)


def test_passes_for_some_sites_each_find_the_same(case: tuple[Any, Unit]) -> None:
    model, unit = case
    sites = sites_of(model, unit)
    whole, parts = (
        second_order(WholeReading(model, scored_batches()), sites, with_gradients=True, most_bytes=most)
        for most in (10**9, 1)
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_without_a_position_that_counts_all_cost_nothing() -> None:
    model = llama()
    (site, *_) = sites_of(model, "kv_group")
    nothing = Moments(torch.zeros(32, 32), torch.zeros(32, 32))
    assert slopes(site, nothing).tolist() == [0.0, 0.0]


def test_what_is_not_a_number_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.nan
    scores = score_heads(model, "reconstruction", scored_batches(), blocks=1)
    with pytest.raises(InputError, match="not a number"):
        scores.plan(0.5)


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("criterion", ["second-order", "reconstruction"])
def test_budgets_are_met(kind: Any, criterion: Any) -> None:
    model = llama()
    costs = counted_costs(model, kind, unit="kv_group", hidden=True, length=8)
    limit = costs.fixed + 0.6 * (costs.total - costs.fixed)
    scores = score_heads(model, criterion, scored_batches(), blocks=1).over(costs)
    plan = scores.within(costs, limit)
    assert 0.97 * limit < costs.of({key: len(units) for key, units in plan.units.items()}) <= limit
    cut = model_cost(deadhead.cut(model, plan), length=8)
    assert (cut.parameters if kind == "params" else cut.flops_per_token) <= limit
