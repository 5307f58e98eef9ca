"""Memory of training by a formula: near what tensors really hold, and with the properties that it must have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import deadhead
from benchmarks._tiny_models import tiny_config as tiny_transformers_config
from benchmarks.memory import MODELS, compare, configuration
from deadhead.errors import InputError, UnsupportedModel
from deadhead.measure.cost import skeleton
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.training_memory import TrainingMemory, training_memory
from tests.random_models import tiny_config

# Not the benchmark's, by which the formula was made.
_SHAPES = ((3, 192, 512, 2, 96), (2, 64, 2048, 4, 48))
_SETTINGS: tuple[dict[str, Any], ...] = ({}, {"gradient_checkpointing": True}, {"freeze_weights": True})


def _llama(dtype: str = "float32", length: int = 64) -> Any:
    return skeleton(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=61,
            max_position_embeddings=length,
            bos_token_id=0,
            eos_token_id=1,
            dtype=dtype,
        )
    )


def _memory(model: Any, **settings: Any) -> TrainingMemory:
    return training_memory(model, PruneRecipe(**{"batch_size": 4, "sequence_length": 24, "blocks": False, **settings}))


@pytest.mark.parametrize("settings", _SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [_SHAPES[0], pytest.param(_SHAPES[1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_formula_is_near_the_measured_peak(model: str, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    formula, measured = compare(model, *shape, **settings)
    assert formula.total == pytest.approx(measured, rel=0.25)


def test_weights_gradients_and_moments() -> None:
    model = _llama("bfloat16")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    # Of each of the 3 × 2 groups a gate, and its noise and output difference.
    gates, beside = 6 * 4, 6 * (4 + 4)
    full = _memory(model)
    assert full.weights == 4 * numbers + buffers + gates + beside
    assert full.gradients == 4 * numbers + gates
    assert full.optimizer == 8 * numbers + gates
    frozen = _memory(model, freeze_weights=True)
    assert frozen.weights == 2 * numbers + buffers + gates + beside
    assert (frozen.gradients, frozen.optimizer) == (gates, gates)
    lora = _memory(model, lora_rank=2)
    widths = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 80) * 3
    adapters = 4 * 3 * 2 * widths
    assert lora.weights == frozen.weights + adapters
    assert (lora.gradients, lora.optimizer) == (gates + adapters, gates + 2 * adapters)
    assert _memory(model, freeze_weights=True, unit="head").gradients == 2 * gates


@pytest.mark.parametrize("kind", MODELS)
def test_what_grows_and_what_saves(kind: str) -> None:
    model = skeleton(configuration(kind, 4, 64, 128, 32))
    settings: dict[str, Any] = {"sequence_length": 32, "batch_size": 8}
    plain = _memory(model, **settings)
    double = _memory(model, **{**settings, "batch_size": 16})
    assert plain.activations < double.activations <= 2 * plain.activations
    assert _memory(model, **settings, gradient_checkpointing=True).activations < plain.activations
    assert _memory(model, **settings, freeze_weights=True).activations < plain.activations
    assert _memory(skeleton(configuration(kind, 8, 64, 128, 32)), **settings).activations > plain.activations
    assert _memory(skeleton(configuration(kind, 4, 64, 4096, 32)), **settings).activations > plain.activations
    assert plain.activations < plain.total <= sum(vars(plain).values()) - plain.total


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma2", "gpt_neox", "opt", "falcon", "phi3"])
def test_other_architectures(kind: str) -> None:
    model = skeleton(tiny_transformers_config(kind))
    assert 0 < _memory(model, batch_size=1).activations < _memory(model, batch_size=8).activations


def test_mixed_precision_keeps_less_of_a_large_batch() -> None:
    settings: dict[str, Any] = {"batch_size": 64, "sequence_length": 64}
    assert _memory(_llama(), **settings, bf16=True).activations < _memory(_llama(), **settings).activations


def test_the_length_is_that_of_training() -> None:
    """Unless it is said: 256, or all positions there are, or a segment."""
    assert _memory(_llama(), sequence_length=None) == _memory(_llama(), sequence_length=64)
    ours = skeleton(tiny_config(segment_length=6))
    assert _memory(ours, sequence_length=None) == _memory(ours, sequence_length=6)


def test_a_model_stays_as_it_is() -> None:
    """One with weights, or with gates, counts as its skeleton does."""
    model = AutoModelForCausalLM.from_config(_llama().config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _memory(_llama(), gradient_checkpointing=True)
    assert _memory(model, gradient_checkpointing=True) == expected
    assert not model.training and deadhead.gates_of(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gates = deadhead.attach(model)
    assert _memory(model, gradient_checkpointing=True) == expected
    assert deadhead.gates_of(model) is gates


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="has 64 positions, but got a sequence_length of 65"):
        _memory(_llama(), sequence_length=65)
    with pytest.raises(InputError, match="reads segments of 6 tokens"):
        _memory(skeleton(tiny_config(segment_length=6)), sequence_length=8)
    with pytest.raises(InputError, match="LoRA is for pretrained models of transformers"):
        _memory(skeleton(tiny_config()), sequence_length=None, lora_rank=2)
    with pytest.raises(UnsupportedModel):
        _memory(skeleton(tiny_transformers_config("mamba")))
