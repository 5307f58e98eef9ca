"""Criteria that look at activations, against sums that are written out token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deadhead.criteria.activations import flap, wanda
from deadhead.criteria.reading import WholeReading
from deadhead.criteria.scoring import score_heads
from deadhead.layouts import Site
from deadhead.plans.plan import Unit
from tests.criteria.models import STOCK, columns, counted, llama, scored_batches, seen, sites_of, weight_of


@pytest.fixture(params=STOCK)
def case(request: Any) -> tuple[Any, Unit]:
    make, unit = STOCK[request.param]
    return make().double(), unit


def rows_of(model: Any, site: Site) -> Tensor:
    """What the output projection gets at every position that counts, (R, n)."""
    found = []
    for batch in scored_batches():
        inputs, *_ = seen(model, site, batch)
        found += [
            inputs[row, place]
            for row in range(inputs.shape[0])
            for place in range(inputs.shape[1])
            if counted(batch)[row, place]
        ]
    return torch.stack(found)


def test_wanda_is_the_weights_times_the_length_of_what_they_multiply(case: tuple[Any, Unit]) -> None:
    model, unit = case
    sites = sites_of(model, unit)
    for site, scores in zip(sites, wanda(WholeReading(model, scored_batches()), sites), strict=True):
        rows, weight = rows_of(model, site), weight_of(site)
        expected = []
        for place in range(len(site.units)):
            total = 0.0
            for column in columns(site, place):
                length = float(sum(float(row[column]) ** 2 for row in rows)) ** 0.5
                total += float(weight[:, column].abs().sum()) * length
            expected.append(total)
        mean = sum(expected) / len(expected)
        torch.testing.assert_close(scores, torch.tensor(expected).double() / mean, rtol=1e-4, atol=1e-6)


def test_flap_is_the_standardised_fluctuation(case: tuple[Any, Unit]) -> None:
    model, unit = case
    sites = sites_of(model, unit)
    for site, scores in zip(sites, flap(WholeReading(model, scored_batches()), sites), strict=True):
        rows, weight = rows_of(model, site), weight_of(site)
        plain = []
        for column in range(rows.shape[1]):
            values = rows[:, column]
            variance = float(((values - values.mean()) ** 2).mean())
            plain.append(variance * float((weight[:, column] ** 2).sum()))
        mean = sum(plain) / len(plain)
        deviation = (sum((value - mean) ** 2 for value in plain) / len(plain)) ** 0.5
        expected = [
            sum((plain[column] - mean) / deviation for column in columns(site, place)) / site.unit_dim
            for place in range(len(site.units))
        ]
        torch.testing.assert_close(scores, torch.tensor(expected).double(), rtol=1e-3, atol=1e-4)


def test_what_never_changes_has_no_fluctuation_but_a_length() -> None:
    model = llama()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        for projection in (layer.gate_proj, layer.up_proj):
            projection.weight[5] = 0
    site = next(site for site in sites_of(model, "kv_group") if site.is_hidden)
    (scores,) = flap(WholeReading(model, scored_batches()), [site])
    assert int(scores.argmin()) == 5
    (scores,) = wanda(WholeReading(model, scored_batches()), [site])
    assert float(scores[5]) == 0


def test_equal_units_are_as_good_as_the_mean() -> None:
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for scores in score_heads(model, "flap", scored_batches()).scores.values():
        assert scores.tolist() == [0.0, 0.0]
