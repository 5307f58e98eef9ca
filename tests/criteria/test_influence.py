"""The influence of sublayers, against cosines token by token; whole sublayers go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deadhead
from deadhead.criteria.influence import influence
from deadhead.criteria.reading import WholeReading
from deadhead.criteria.scoring import score_heads
from deadhead.measure.cost import counted_costs, model_cost
from tests.criteria.models import STOCK, counted, llama, scored_batches, sites_of, streams, sublayer


@pytest.mark.parametrize("name", STOCK)
def test_influence_is_how_far_the_stream_turns(name: str) -> None:
    make, unit = STOCK[name]
    model = make().double()
    sites = sites_of(model, unit)
    for site, scores in zip(sites, influence(WholeReading(model, scored_batches()), sites), strict=True):
        turned = []
        for batch in scored_batches():
            with torch.no_grad():
                found = streams(model, batch)
            before, after = found[sublayer(site)], found[sublayer(site) + 1]
            for row, place in counted(batch).nonzero().tolist():
                one, other = before[row, place], after[row, place]
                turned.append(1 - float(one @ other / (one.norm() * other.norm())))
        assert scores.tolist() == pytest.approx([sum(turned) / len(turned) / len(site.units)] * len(site.units))


def test_whole_sublayers_go() -> None:
    model: Any = llama()
    with torch.no_grad():
        # Sublayers that hardly matter: the feed-forward part of the first layer and the attention of the second.
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-2)
    costs = counted_costs(model, "params", unit="kv_group", hidden=True)
    scores = score_heads(model, "influence", scored_batches(), blocks=1).over(costs)
    gone = sum(
        parameter.numel()
        for module in (model.model.layers[0].mlp, model.model.layers[1].self_attn)
        for parameter in module.parameters()
    )
    plan = scores.within(costs, costs.total - gone)
    assert plan.hidden_units is not None
    assert [plan.heads, plan.hidden_units.counts] == [[2, 0], [0, 48]]
    before = model_cost(model).parameters
    assert model_cost(deadhead.cut(model, plan)).parameters == before - gone
