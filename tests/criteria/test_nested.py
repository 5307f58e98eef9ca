"""Sublayers of any size: fits against least squares, whole sizes against the cut model, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deadhead
from deadhead.attaching import choices_of
from deadhead.criteria.nested import NestedSublayer, resized
from deadhead.criteria.reading import WholeReading
from deadhead.criteria.second_order import measured
from deadhead.layouts import find_layout, head_columns
from deadhead.plans.plan import Unit
from deadhead.plans.unit_plan import UnitPlan
from tests.criteria.models import IDS, STOCK, scored_batches, sites_of
from tests.random_models import difference

RIDGE = 0.1


def moments_of(model: Any, unit: Unit) -> list[Tensor]:
    """The second moments of what each sublayer's output projection reads."""
    found = measured(WholeReading(model, scored_batches()), sites_of(model, unit), with_gradients=False)
    return [moments.inputs_nn / moments.count for moments in found]


def nested(model: Any, unit: Unit, seed: int = 0) -> list[NestedSublayer]:
    """The sublayers of a model, each with its units in a random order, those of a feed-forward part by fives."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for site, inputs_nn in zip(sites_of(model, unit), moments_of(model, unit), strict=True):
        order = [site.units[place] for place in torch.randperm(len(site.units), generator=draw).tolist()]
        step = 5 if site.is_hidden else 1
        choices = [order[start : start + step] for start in range(0, len(order), step)]
        found.append(NestedSublayer(site, inputs_nn, choices, ridge=RIDGE))
    return found


@pytest.fixture(params=STOCK)
def case(request: Any) -> tuple[Any, Unit]:
    make, unit = STOCK[request.param]
    return make().double(), unit


def weight_at(sublayer: NestedSublayer, size: Tensor) -> Tensor:
    """The weight at a size, with a zero in each column that is not computed."""
    units, weight_DS = sublayer.at(size)
    found = weight_DS.new_zeros(sublayer.weight_Dn.shape)
    return found.index_copy(1, sublayer.site.rows(units), weight_DS)


def test_a_fit_solves_least_squares_with_a_ridge(case: tuple[Any, Unit]) -> None:
    for sublayer, inputs_nn in zip(nested(*case), moments_of(*case), strict=True):
        for count in range(1, len(sublayer.choices)):
            columns = sublayer.site.rows(sublayer.kept(count))
            weight = sublayer.weight_Dn
            # Features whose second moments are C, and the ridge as as many rows more, which draw to the weight.
            values, vectors = torch.linalg.eigh(inputs_nn.double())
            rows = (values.clamp(min=0).sqrt() * vectors).T
            root = (RIDGE * inputs_nn.double().diagonal().mean()).sqrt()
            left = torch.cat([rows[:, columns], root * torch.eye(len(columns), dtype=torch.float64)])
            right = torch.cat([rows @ weight.T, root * weight[:, columns].T])
            expected = torch.linalg.lstsq(left, right).solution.T
            assert difference(sublayer.fit(count), expected) < 1e-4  # moments are in float32


def test_the_ends_are_the_weight_and_nothing(case: tuple[Any, Unit]) -> None:
    for sublayer in nested(*case):
        assert torch.equal(weight_at(sublayer, torch.tensor(float(sublayer.units))), sublayer.weight_Dn)
        assert not bool(weight_at(sublayer, torch.tensor(0.0)).any())


def test_the_weight_is_continuous_and_its_gradient_is_that_of_finite_differences(case: tuple[Any, Unit]) -> None:
    sublayer = nested(*case)[-1]
    for knot in sublayer.counts[1:-1]:
        below, above = (weight_at(sublayer, torch.tensor(knot + side, dtype=torch.float64)) for side in (-1e-9, 1e-9))
        assert difference(below, above) < 1e-6
    size = torch.tensor(sublayer.counts[1] + 0.7, dtype=torch.float64, requires_grad=True)
    mask = torch.randn_like(sublayer.weight_Dn)
    (found,) = torch.autograd.grad((weight_at(sublayer, size) * mask).sum(), size)
    ahead, behind = (float((weight_at(sublayer, size.detach() + side) * mask).sum()) for side in (1e-5, -1e-5))
    assert float(found) == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The key/value cache grows")
@pytest.mark.parametrize("seed", range(3))
def test_a_resized_model_is_the_cut_one_with_its_projections_fitted(case: tuple[Any, Unit], seed: int) -> None:
    model, unit = case
    sublayers = nested(model, unit, seed)
    draw = torch.Generator().manual_seed(seed)
    counts = [int(torch.randint(len(each.choices) + 1, (), generator=draw)) for each in sublayers]
    sizes = [torch.tensor(float(each.counts[count])) for each, count in zip(sublayers, counts, strict=True)]
    with torch.no_grad(), resized(sublayers, sizes):
        found = model(input_ids=IDS).logits
    kept = {each.site.key: each.kept(count) for each, count in zip(sublayers, counts, strict=True)}
    plan = choices_of([each.site for each in sublayers], unit, 1).plan_of(kept)
    assert isinstance(plan.hidden_units, UnitPlan)
    fits = {each.site.key: each.fit(count) for each, count in zip(sublayers, counts, strict=True)}
    deadhead.cut(model, plan)
    for site in find_layout(model).all_sites(model, unit, hidden=True):
        if site.units:
            weight = fits[site.key]
            with torch.no_grad():
                head_columns(site.output).copy_(weight)
    with torch.no_grad():
        assert difference(model(input_ids=IDS).logits, found) < 1e-10


def test_units_that_neither_size_has_are_not_computed(case: tuple[Any, Unit]) -> None:
    model, unit = case
    sublayers = nested(model, unit)
    sizes = [torch.tensor(each.counts[-3] + 0.5) for each in sublayers]
    read: dict[int, int] = {}

    def note(place: int, inputs: tuple[Tensor, ...]) -> None:
        read[place] = inputs[0].shape[-1]

    hooks = [
        each.site.output.register_forward_pre_hook(lambda _, inputs, place=place: note(place, inputs))
        for place, each in enumerate(sublayers)
    ]
    with torch.no_grad(), resized(sublayers, sizes):
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    assert read == {place: each.counts[-2] * each.site.unit_dim for place, each in enumerate(sublayers)}


def test_the_model_is_back_as_it_was_even_after_a_failure(case: tuple[Any, Unit]) -> None:
    model, unit = case
    sublayers = nested(model, unit)
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    attributes = [dict(vars(module)) for module in model.modules()]
    sizes = [torch.tensor(each.units / 2) for each in sublayers]
    with pytest.raises(KeyboardInterrupt), resized(sublayers, sizes):
        raise KeyboardInterrupt
    after: dict[str, Tensor] = dict(model.named_parameters())
    assert [*before] == [*after]
    for name, (identity, values) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], values)
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_units_that_never_do_anything_are_no_matter(case: tuple[Any, Unit]) -> None:
    sublayer = nested(*case)[0]
    dead = NestedSublayer(sublayer.site, torch.zeros(2 * [sublayer.weight_Dn.shape[1]]), sublayer.choices)
    assert not bool(dead.fit(1).any())
