"""Scores to plans: the lowest go, over all layers or in each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadhead.errors import InputError
from deadhead.plans.choices import Choices
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.scores import HeadScores


def scores(
    values: dict[Any, list[float]],
    *,
    heads: dict[Any, tuple[int, ...]] | None = None,
    total: dict[Any, int] | None = None,
    unit: Any = "head",
    **changes: Any,
) -> HeadScores:
    heads = heads or {layer: tuple(range(len(numbers))) for layer, numbers in values.items()}
    total = total or {layer: max(1, len(numbers)) for layer, numbers in heads.items()}
    choices = Choices(
        unit=unit,
        members={UnitKey("head", layer): [(head,) for head in found] for layer, found in heads.items()},
        total={UnitKey("head", layer): count for layer, count in total.items()},
    )
    keyed = {UnitKey("head", layer): torch.tensor(numbers) for layer, numbers in values.items()}
    return HeadScores(scores=keyed, choices=choices, **changes)


def test_the_lowest_of_all_layers_go() -> None:
    found = scores({0: [0.1, 0.9, 0.2, 0.3], 1: [5.0, 0.15, 6.0, 7.0]})
    assert found.plan(0.5).kept == {0: (1,), 1: (0, 2, 3)}
    assert found.plan(0.5, ranking="layer").kept == {0: (1, 3), 1: (2, 3)}


@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4), seed=st.integers(0, 1000), sparsity=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_the_share_is_exact_and_nothing_kept_is_worth_less_than_what_goes(
    sizes: list[int], seed: int, sparsity: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = scores({layer: torch.rand(size, generator=draw).tolist() for layer, size in enumerate(sizes)})
    plan = found.plan(sparsity)
    assert sum(plan.heads) == sum(sizes) - round(sparsity * sum(sizes))
    kept = [float(found.scores[UnitKey("head", layer)][head]) for layer, heads in plan.kept.items() for head in heads]
    gone = [float(found.scores[UnitKey("head", layer)][head]) for layer in plan.kept for head in plan.cut(layer)]
    assert not kept or not gone or min(kept) >= max(gone)
    by_layer = found.plan(sparsity, ranking="layer")
    assert by_layer.heads == [size - round(sparsity * size) for size in sizes]


def test_indices_are_those_of_the_dense_model_and_emptied_layers_stay_empty() -> None:
    found = scores(
        {0: [3.0, 1.0], 2: [2.0, 4.0]},
        heads={0: (1, 5), 1: (), 2: (0, 7)},
        total={0: 8, 1: 8, 2: 8},
        output_scale=True,
        unit="kv_group",
    )
    expected = HeadPlan(kept={0: [1], 1: [], 2: [7]}, total={0: 8, 1: 8, 2: 8}, unit="kv_group", output_scale=True)
    assert found.plan(0.5) == expected == found.plan(0.5, ranking="layer")


def test_heads_that_must_go_are_among_those_that_go() -> None:
    found = scores({0: [-math.inf, 2.0, -math.inf], 1: [1.0, 3.0, 4.0]})
    assert found.plan(0.0).kept == {0: (1,), 1: (0, 1, 2)}
    assert found.plan(0.5).kept == {0: (1,), 1: (1, 2)}


@pytest.mark.parametrize("sparsity", [-0.1, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="sparsity must lie between 0 and 1"):
        scores({0: [1.0]}).plan(sparsity)


def test_an_unknown_ranking_is_refused() -> None:
    with pytest.raises(InputError, match="takes ranking as .*'global', 'layer'.*, but got 'globl'"):
        scores({0: [1.0]}).plan(0.5, ranking="globl")  # type: ignore[arg-type]


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="not a number"):
        scores({0: [1.0, math.nan]}).plan(0.5)
