"""Costs as sums over layers: totals, interpolation, slopes, and agreement with what is counted of real models."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest
import torch

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.measure.cost import cost_of_kind, counted_costs, model_cost
from deadhead.plans.plan import UnitKey
from deadhead.plans.unit_costs import UnitCosts
from tests import random_models

_HEADS, _BLOCKS = UnitKey("head", 0), UnitKey("block", 0)
COSTS = UnitCosts(
    fixed=5.0,
    tables={
        _HEADS: torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64),
        _BLOCKS: torch.tensor([0.0, 2.0, 2.0, 8.0], dtype=torch.float64),
    },
)


def test_totals_interpolation_slopes_and_what_a_unit_saves() -> None:
    assert COSTS.total == 16.0
    assert COSTS.of({_HEADS: 2, _BLOCKS: 3}) == 16.0
    assert COSTS.of({_HEADS: 0, _BLOCKS: 0}) == 5.0
    assert COSTS.of({_HEADS: 1.5, _BLOCKS: 2.25}) == 5.0 + 2.0 + 3.5
    assert COSTS.of({_HEADS: -1, _BLOCKS: 9}) == 13.0, "counts beyond the table are its ends"
    assert COSTS.slopes({_HEADS: 1, _BLOCKS: 3}) == {_HEADS: 1.5, _BLOCKS: 6.0}
    assert COSTS.slopes({_HEADS: 0, _BLOCKS: 1.4}) == {_HEADS: 1.0, _BLOCKS: 1.0}
    assert COSTS.saved(_HEADS, 2) == 2.0 and COSTS.saved(_BLOCKS, 2) == 0.0
    assert UnitCosts(fixed=2.0, tables={}).total == UnitCosts(fixed=2.0, tables={}).of({}) == 2.0


@pytest.mark.parametrize("kind", ["params", "flops", "kv_cache", "memory"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bert", "deepseek_v3", "own", "transformer-xl"])
def test_the_sum_over_layers_is_what_is_counted_of_the_cut_model(
    model_type: str, kind: Literal["params", "flops", "kv_cache", "memory"]
) -> None:
    model: Any
    if model_type == "own":
        model = random_models.tiny_model()
    elif model_type == "transformer-xl":
        model = random_models.random_model(
            deadhead.models.TransformerXLConfig(  # type: ignore[attr-defined]
                vocab_size=29,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=4,
                feed_forward_size=24,
                memory_length=5,
                segment_length=6,
            ),
            0,
        )
    else:
        model = tiny_model(model_type)
    gates = deadhead.attach(model, blocks=True)
    deadhead.detach(model)
    costs = counted_costs(model, kind, unit=gates.unit, hidden=gates.choices.has_blocks, length=40, texts=3)
    how = {"itemsize": 4, "texts": 3}
    whole = cost_of_kind(model_cost(model, length=40), kind, **how)
    assert costs.total == pytest.approx(whole)
    assert costs.fixed >= 0
    draw = random.Random(1)
    for _ in range(3):
        kept = {
            key: tuple(draw.sample(units, draw.randint(1, len(units)))) for key, units in gates.choices.units.items()
        }
        counted = cost_of_kind(model_cost(model, gates.choices.plan_of(kept), length=40), kind, **how)
        # Persistent vectors are of a head and of a block, so that no sum over the two is exact.
        error = 0.15 if model_type == "own" and kind != "kv_cache" else 1e-6
        assert costs.of({key: len(units) for key, units in kept.items()}) == pytest.approx(counted, rel=error)
        assert counted <= whole
