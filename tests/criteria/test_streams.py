"""The stream around sublayers: against norms of models whose norms show it, and by its sum in others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks._tiny_models import scramble
from benchmarks._tiny_models import tiny_model as stock_model
from deadhead.criteria.streams import Passage, watched
from deadhead.errors import UnsupportedModel
from deadhead.layouts import find_layout
from tests.criteria.models import IDS, STOCK, sites_of, streams, sublayer


def passages(model: Any, unit: Any, ids: torch.Tensor) -> dict[Any, Passage]:
    found: dict[Any, Passage] = {}
    with torch.no_grad(), watched(model, sites_of(model, unit), lambda one: found.update({one.site.key: one})):
        model(input_ids=ids, use_cache=False)
    return found


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_the_stream_is_what_norms_get(name: str) -> None:
    make, unit = STOCK[name]
    model = make().double()
    expected = streams(model, {"input_ids": IDS})
    for site in sites_of(model, unit):
        passage = passages(model, unit, IDS)[site.key]
        place = sublayer(site)
        torch.testing.assert_close(passage.before, expected[place])
        torch.testing.assert_close(passage.after, expected[place + 1])
        assert passage.inputs.shape == (*IDS.shape, len(site.units) * site.unit_dim)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "opt", "gptj", "phi", "falcon"])
def test_norms_behind_a_sublayer_and_parallel_ones_are_followed(kind: str) -> None:
    model = stock_model(kind)
    scramble(model, 0)
    unit = find_layout(model).units(model)[0]
    found = passages(model.eval(), unit, IDS)
    sites = sites_of(model, unit)
    assert len(found) == len(sites)
    for one, other in zip(sites[: len(sites) // 2], sites[len(sites) // 2 :], strict=True):
        attention, feed_forward = found[one.key], found[other.key]
        whole = feed_forward.after - attention.before
        parts = (attention.after - attention.before) + (feed_forward.after - feed_forward.before)
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
        assert float((attention.after - attention.before).norm()) > 0


def test_a_norm_over_the_stream_is_refused() -> None:
    model = stock_model("openai-gpt")
    scramble(model, 0)
    with pytest.raises(UnsupportedModel, match="add what attention and feed-forward give to one residual stream"):
        passages(model.eval(), "head", IDS)


def test_hooks_are_gone_afterwards() -> None:
    model = STOCK["llama, groups"][0]()
    passages(model, "kv_group", IDS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
