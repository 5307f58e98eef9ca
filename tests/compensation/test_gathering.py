"""What a projection reads and should give, layer by layer, against the models themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deadhead.compensation.calibration import divided
from deadhead.compensation.gathering import CutLayer, pass_dense
from deadhead.compensation.moments import Moments
from deadhead.compensation.streams import stream_of
from deadhead.compensation.sublayers import find_sublayers, layers_path, projection
from tests.compensation.small_pairs import KINDS, cut_by_hand, dense_model, text_of
from tests.random_models import randomise

RESIDUAL = {"llama", "gpt2", "neox", "opt", "all-attention", "transformer-xl"}


def passed(kind: str) -> Any:
    """Return the streams of a pair in their first layer, and what the dense model did in it."""
    dense = dense_model(kind, torch.float64)
    model = cut_by_hand(dense)
    calibration = divided(model, text_of(dense, rows=16))
    sublayers = find_sublayers(model, dense)
    stream, other = (
        stream_of(each, calibration, layers_path(dense, [each.path for each in sublayers])) for each in (model, dense)
    )
    within = [sublayer for sublayer in sublayers if sublayer.is_within(stream.paths[0])]
    return stream, dense, calibration, pass_dense(other, 0, within)


def error(moments: Moments, weight: Tensor, goal: Tensor) -> float:
    """Return the error of one projection."""
    return float(moments.errors(weight[None], torch.ones(1, 1, dtype=weight.dtype), goal))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_residual_streams_are_told_by_their_numbers(kind: str) -> None:
    _, _, _, found = passed(kind)
    assert (found.residuals is not None) == (kind in RESIDUAL)
    assert len(found.order) == (1 if kind == "all-attention" else 2)
    # Attention comes first.
    assert ("att" in found.order[0].path) == (kind != "gpt2") or "attn" in found.order[0].path


@pytest.mark.parametrize("kind", sorted(RESIDUAL))
@torch.no_grad()
def test_in_the_first_sublayer_both_targets_are_the_same(kind: str) -> None:
    stream, dense, calibration, found = passed(kind)
    moments = CutLayer(stream, 0, found, dense, calibration).moments(0)
    assert moments is not None
    for part in moments:
        # Both models read the same embeddings, so what the dense layer gives is what its stream gains.
        assert torch.allclose(part.yx_KDN[0], part.yx_KDN[1], atol=1e-6)
    # What the cut projection gives differs from it.
    output = stream.model.get_submodule(found.order[0].path)
    assert error(moments[0], projection(output), torch.tensor([0.0, 1.0], dtype=torch.float64)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_uncut_model_has_no_error(kind: str) -> None:
    dense = dense_model(kind, torch.float64)
    calibration = divided(dense, text_of(dense, rows=16))
    sublayers = find_sublayers(dense, dense)
    layers = layers_path(dense, [each.path for each in sublayers])
    stream, other = stream_of(dense, calibration, layers), stream_of(dense, calibration, layers)
    for index, path in enumerate(stream.paths):
        within = [sublayer for sublayer in sublayers if sublayer.is_within(path)]
        found = pass_dense(other, index, within)
        layer = CutLayer(stream, index, found, dense, calibration)
        for place, sublayer in enumerate(found.order):
            moments = layer.moments(place)
            assert moments is not None
            mix = torch.ones(len(moments[0].yy_KK), dtype=torch.float64) / len(moments[0].yy_KK)
            assert error(moments[1], projection(dense.get_submodule(sublayer.path)), mix) < 1e-8
        layer.advance()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fitted_layer_goes_on_as_if_it_were_run(kind: str) -> None:
    stream, dense, calibration, found = passed(kind)
    layer = CutLayer(stream, 0, found, dense, calibration)
    for place, sublayer in enumerate(found.order):
        assert layer.moments(place) is not None
        randomise(stream.model.get_submodule(sublayer.path), place)
    before = list(stream.states)
    layer.advance()
    after, stream.states = stream.states, before
    stream.advance(0)
    for state, expected in zip(after, stream.states, strict=True):
        assert state is not None and expected is not None
        assert torch.allclose(state, expected, rtol=1e-9, atol=1e-9)
        assert state.dtype == expected.dtype


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_projection_reads_is_its_own_also_if_the_model_learned_since_the_cut(kind: str, learned: bool) -> None:
    stream, dense, calibration, found = passed(kind)
    if learned:
        randomise(stream.model, 3)
    run = replace(found, order=[replace(sublayer, columns=None) for sublayer in found.order])
    for place, sublayer in enumerate(found.order):
        assert sublayer.columns is not None
        selected, itself = CutLayer(stream, 0, found, dense, calibration), CutLayer(stream, 0, run, dense, calibration)
        for earlier in range(place):
            selected.moments(earlier), itself.moments(earlier)
        (mine, held), (its, its_held) = selected.moments(place) or (), itself.moments(place) or ()
        assert torch.allclose(mine.xx_NN, its.xx_NN, rtol=1e-9)
        assert torch.allclose(mine.yx_KDN, its.yx_KDN, rtol=1e-9)
        weights = projection(stream.model.get_submodule(sublayer.path))[None]
        goal = torch.ones(len(mine.yy_KK), dtype=torch.float64) / len(mine.yy_KK)
        errors = [each.errors(weights, torch.ones(1, 1, dtype=torch.float64), goal) for each in (held, its_held)]
        assert torch.allclose(*errors, rtol=1e-6)


@torch.no_grad()
def test_padding_does_not_count() -> None:
    dense = dense_model("bert")
    model = cut_by_hand(dense)
    batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in text_of(dense, rows=16)]
    for batch in batches:
        batch["attention_mask"][:, 15:] = 0
    other = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in batches]
    for batch in other:
        batch["input_ids"][:, 15:] = 3
    sums = []
    for each in (batches, other):
        calibration = divided(model, each)
        sublayers = find_sublayers(model, dense)
        stream, second = (
            stream_of(m, calibration, layers_path(dense, [each.path for each in sublayers])) for m in (model, dense)
        )
        found = pass_dense(second, 0, [sublayer for sublayer in sublayers if sublayer.is_within(stream.paths[0])])
        moments = CutLayer(stream, 0, found, dense, calibration).moments(0)
        assert moments is not None
        sums.append(moments[0].xx_NN / moments[0].xx_NN.diagonal().sum())
    assert torch.allclose(*sums, rtol=1e-3)
