"""The All-attention layout: its sites, and which models it takes."""

from __future__ import annotations

import pytest
import torch

import deadhead.layouts
from deadhead.cutting import cut
from deadhead.layouts import Layout, Site, find_layout, head_columns
from deadhead.layouts.all_attention import AllAttentionLayout
from deadhead.plans.plan import HeadPlan
from tests.random_models import tiny_model


def test_sites_name_the_heads_there_are_and_those_there_were() -> None:
    model = tiny_model()
    for layer, site in enumerate(AllAttentionLayout().sites(model, "head")):
        assert (site.layer, site.units, site.total, site.unit_dim) == (layer, (0, 1, 2, 3), 4, 4)
        assert site.module is model.model.layers[layer].attention
        assert site.output is model.model.layers[layer].attention.o_proj
        assert head_columns(site.output).shape == (16, 16)
    cut(model, HeadPlan(kept={0: [3, 1], 2: []}, total=dict.fromkeys(range(3), 4)))
    sites = AllAttentionLayout().sites(model, "head")
    assert [site.units for site in sites] == [(1, 3), (0, 1, 2, 3), ()]
    assert [site.total for site in sites] == [4, 4, 4]
    for part in sites[0].selections((3,)):
        assert 2 * len(part.index) == sites[0].module.get_parameter(part.path).shape[part.dim]


def test_both_model_classes_have_the_layout() -> None:
    model = tiny_model()
    assert isinstance(find_layout(model), AllAttentionLayout)
    assert isinstance(find_layout(model.model), AllAttentionLayout)
    assert [site.module for site in find_layout(model.model).sites(model.model, "head")] == [
        layer.attention for layer in model.model.layers
    ]


def test_the_layout_listed_first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = AllAttentionLayout(), AllAttentionLayout()
    monkeypatch.setattr(deadhead.layouts, "_LAYOUTS", [first, second])
    assert find_layout(tiny_model()) is first


def test_a_layout_must_answer_every_question() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Layout()  # type: ignore[abstract]


def test_per_token_slices_are_the_projections_of_tokens() -> None:
    model = tiny_model(projection_bias=True)
    (site, *_) = AllAttentionLayout().sites(model, "head")
    assert isinstance(site, Site)
    per_token = {part.path for part in site.selections(site.units) if part.per_token}
    assert per_token == {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert torch.equal(head_columns(site.output), model.model.layers[0].attention.o_proj.weight)
