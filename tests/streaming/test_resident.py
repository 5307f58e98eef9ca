"""A model with the weights of a layer at a time: the function of the whole one, and no more than a layer is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.streaming.layer_check import NotStreamable
from deadhead.streaming.resident import ResidentLayers
from deadhead.streaming.stored_model import open_stored


def _resident(folder: Path, kind: str) -> ResidentLayers:
    model = tiny_model(kind, seed=1)
    model.save_pretrained(folder / kind, max_shard_size="20KB")
    opened = open_stored(folder / kind)
    return opened.resident(opened.without_weights())


def _held(model: torch.nn.Module) -> int:
    """Return the bytes that parameters take; a stand-in takes those of one number."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


# Biases, tied embeddings, experts that lie in files one by one.
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_the_whole_model_runs_with_a_layer_of_it_in_memory(kind: str, tmp_path: Path) -> None:
    resident = _resident(tmp_path, kind)
    whole = deadhead.load(tmp_path / kind)
    ids = torch.arange(12).view(2, 6)
    most: list[int] = []
    for layer in resident.layers:
        layer.register_forward_hook(lambda *_: most.append(_held(resident.model)))
    with resident.outside():
        found = resident.model(input_ids=ids).logits
    assert torch.equal(found, whole(input_ids=ids).logits)
    layer = max(_held(each) for each in _layers(whole))
    outside = _held(whole) - sum(_held(each) for each in _layers(whole))
    assert max(most) <= 1.01 * (layer + outside) + 8 * len(list(whole.parameters()))
    resident.release()
    assert _held(resident.model) < 0.1 * layer


def _layers(model: Any) -> list[torch.nn.Module]:
    return list(getattr(model.base_model, "layers", None) or model.base_model.h)


@torch.no_grad()
def test_a_layer_that_is_no_longer_needed_goes(tmp_path: Path) -> None:
    resident = _resident(tmp_path, "llama")
    nothing = _held(resident.model)
    with resident.loaded(1):
        assert _held(resident.layers[1]) > 10 * nothing
        resident.load(0)
        assert _held(resident.layers[1]) < nothing + 100
    assert _held(resident.model) == nothing


def test_what_is_not_stored_is_told(tmp_path: Path) -> None:
    resident = _resident(tmp_path, "llama")
    lacking = ResidentLayers(resident.model, resident.path, lambda names: {})
    with pytest.raises(NotStreamable, match="has another name or shape in the file than in memory"):
        lacking.load(0)
