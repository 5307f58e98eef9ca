"""Layers that are run by themselves compute what they do in the model, in text with memory too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deadhead.compensation.calibration import divided, run_stack
from deadhead.compensation.streams import stream_of
from deadhead.compensation.sublayers import find_sublayers, layers_path
from tests.compensation.small_pairs import KINDS, cut_by_hand, dense_model, text_of
from tests.random_models import assert_unchanged, difference, snapshot


def stream(model: Any, dense: Any) -> Any:
    calibration = divided(model, text_of(dense, rows=8))
    return stream_of(
        model, calibration, layers_path(dense, [each.path for each in find_sublayers(model, dense)])
    ), calibration


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_by_themselves_give_what_the_model_gives(kind: str) -> None:
    dense = dense_model(kind)
    model = cut_by_hand(dense, emptied=True)
    before = snapshot(model)
    found, calibration = stream(model, dense)
    assert_unchanged(model, before)
    assert not found.is_whole
    last: list[torch.Tensor] = []
    path = found.paths[-1]
    with model.get_submodule(path).register_forward_hook(
        lambda module, args, output: last.append(output if isinstance(output, torch.Tensor) else output[0])
    ):
        memory = None
        for batch in calibration.batches:
            if calibration.has_memory:
                memory = None if bool(batch["is_first"].any()) else memory
                stack = model.base_model
                memory = stack(batch["input_ids"], use_cache=False, memory=memory, return_dict=True).memory
            else:
                run_stack(model, batch)
    for index in range(len(found.layers)):
        found.advance(index)
    for state, expected in zip(found.states, last, strict=True):
        assert difference(state, expected) < 1e-5


@torch.no_grad()
def test_layers_that_the_model_runs_twice_are_not_run_by_themselves() -> None:
    dense = dense_model("llama")
    layers: Any = dense.model.layers

    class Twice(nn.ModuleList):
        """Runs its second layer twice, as a model that shares layers does."""

        def __iter__(self) -> Any:
            return iter([self[0], self[1], self[1], self[2]])

        def __getitem__(self, index: Any) -> Any:
            return self if isinstance(index, slice) else super().__getitem__(index)

    dense.model.layers = Twice(layers)
    found, _ = stream(dense, dense)
    assert found.is_whole


def test_every_projection_of_the_dense_model_is_found() -> None:
    dense = dense_model("opt")
    model = cut_by_hand(dense, emptied=True)
    sublayers = find_sublayers(model, dense)
    assert len(sublayers) == 6
    # The feed-forward part of OPT lies in the layer itself, beside attention.
    parts = {sublayer.path: sublayer.parts for sublayer in sublayers}
    assert parts["model.decoder.layers.0.fc2"] == ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2")
    assert parts["model.decoder.layers.0.self_attn.out_proj"] == ("model.decoder.layers.0.self_attn",)
