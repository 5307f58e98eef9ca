"""Layers without heads among others: their places in what transformers records, in its caches, and in files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.cache_utils import Cache, QuantizedLayer

from benchmarks._tiny_models import VOCABULARY
from tests.models.pruned.uneven_models import uneven_model

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


def attentions(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(input_ids=IDS, output_attentions=True).attentions
    return found


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "bert", "gptj", "xlm"])
def test_attentions_are_those_of_the_layers_by_index(model_type: str) -> None:
    model = uneven_model(model_type, (1,))
    model.set_attn_implementation("eager")
    found = attentions(model)
    heads = [weights.shape[1] for weights in found]
    assert heads[1] == 0 < heads[2] < heads[0]
    assert {(weights.shape[0], *weights.shape[2:]) for weights in found} == {(2, 7, 7)}


@pytest.mark.parametrize(("model_type", "auto"), [("llama", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)])
def test_attentions_of_what_was_loaded_copied_or_pickled(model_type: str, auto: Any, tmp_path: Path) -> None:
    model = uneven_model(model_type, (0, -1))
    model.save_pretrained(tmp_path)
    ways = (
        auto.from_pretrained(tmp_path, attn_implementation="eager"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    )
    model.set_attn_implementation("eager")
    expected = attentions(model)
    assert [weights.shape[1] for weights in expected][::2] == [0, 0]
    for other in ways:
        other.set_attn_implementation("eager")
        found = attentions(other)
        assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_attentions_of_a_step_reach_over_the_cache() -> None:
    model = uneven_model("llama", (0,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        found = model(input_ids=IDS[:, 5:], past_key_values=cache, output_attentions=True).attentions
    assert {(weights.shape[0], *weights.shape[2:]) for weights in found} == {(2, 2, 7)}


def test_where_no_layer_gives_weights_an_empty_one_does_not() -> None:
    model = uneven_model("llama", (0,))
    assert model.config._attn_implementation == "sdpa"
    assert attentions(model) == ()


class GroupedLayer(QuantizedLayer):
    """A quantised layer of a cache that takes whole groups only, as those of quanto and HQQ do, and loses nothing."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        assert not tensor.numel() % self.q_group_size
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_quantised_caches_have_whole_groups_of_an_empty_layer(model_type: str) -> None:
    model = uneven_model(model_type, (0, -1))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "attention_mask": torch.ones_like(IDS)}
    cache = Cache(layers=[GroupedLayer(q_group_size=8, residual_length=4) for _ in range(3)])
    assert torch.equal(model.generate(IDS, past_key_values=cache, **settings), model.generate(IDS, **settings))
