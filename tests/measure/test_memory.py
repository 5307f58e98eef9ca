"""Memory of training on paper: the same bytes as a step with real weights holds, and none of its own."""

from __future__ import annotations

import resource
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

import deadhead
from benchmarks._tiny_models import tiny_config as tiny_transformers_config
from deadhead.errors import InputError, UnsupportedModel
from deadhead.measure.memory import Mode, TrainingMemory, step_memory, training_memory
from deadhead.training.phases.choosing import attach_gates
from deadhead.training.phases.learning import checkpoint_activations, learner
from deadhead.training.recipes.recipe import PruneRecipe
from tests.helpers import tiny_config

_LENGTH = 24


def _llama(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaConfig(**{**sizes, **changes})


def _gpt2() -> GPT2Config:
    return GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=61,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        loss_type="ForCausalLM",
    )


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


def _really(config: PreTrainedConfig, recipe: PruneRecipe) -> TrainingMemory:
    """Count a step of a model with weights, set up as training does."""
    model = _made(config)
    attach_gates(model, recipe)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model, True)
    with learner(model, recipe) as trainee:
        return step_memory(trainee, recipe)


_CONFIGS = {
    "llama": _llama,
    "llama in bfloat16": lambda: _llama(dtype="bfloat16"),
    "gpt2 with dropout": _gpt2,
    "mixture of experts": lambda: tiny_transformers_config("qwen3_moe"),
    "sliding window": lambda: tiny_transformers_config("gemma2"),
    "all-attention": lambda: tiny_config(attention_dropout=0.2, hidden_dropout=0.1),
    "adaptive softmax": lambda: tiny_config(adaptive_cutoffs=[5], adaptive_factor=2),
}


_SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True},
    {"bf16": True},
    {"mode": "frozen"},
    {"blocks": True},
    {"mode": "lora"},
    {"mode": "lora", "gradient_checkpointing": True, "bf16": True},
]
# Experts have neither blocks nor, in deadhead, adapters; deadhead's own models take no adapters.
_TAKEN = {"mixture of experts": 4, "all-attention": 5, "adaptive softmax": 5}
_CASES = [(name, settings) for name in _CONFIGS for settings in _SETTINGS[: _TAKEN.get(name)]]


@pytest.mark.parametrize(("name", "settings"), _CASES, ids=lambda value: str(value) if value else "full")
def test_to_the_byte(name: str, settings: dict[str, Any]) -> None:
    """What is counted without weights is what the same meter counts with them, in every kind of training."""
    config = _CONFIGS[name]()
    mode = settings.get("mode", "full")
    length = None if hasattr(config, "memory_length") else _LENGTH
    options = {name: value for name, value in settings.items() if name != "mode"}
    recipe = PruneRecipe(
        batch_size=3,
        sequence_length=length,
        lora_rank=4 if mode == "lora" else 0,
        freeze_weights=mode == "frozen",
        **{"blocks": False, **options},
    )
    paper = training_memory(config, mode=mode, batch_size=3, length=length, lora_rank=4, **options)
    assert paper == _really(config, recipe)


def test_activations_are_what_autograd_saves() -> None:
    """Deep, with few words: nearly all that a step holds are the storages that hooks of autograd see saved."""
    config = _llama(num_hidden_layers=12, vocab_size=8)
    model = _made(config).train()
    deadhead.attach(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros((4, _LENGTH), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    held = sum(storage.nbytes() for storage in saved.values())
    paper = training_memory(config, mode="full", batch_size=4, length=_LENGTH)
    assert held <= paper.activations <= 1.1 * held


@pytest.mark.parametrize("kind", [_llama, _gpt2])
def test_what_learns_decides(kind: Any) -> None:
    full, lora, frozen = (
        training_memory(kind(), mode=cast(Mode, mode), batch_size=2, length=_LENGTH, lora_rank=2)
        for mode in ("full", "lora", "frozen")
    )
    assert full.total > lora.total > frozen.total
    assert full.gradients > lora.gradients > frozen.gradients
    assert full.optimizer > lora.optimizer > frozen.optimizer
    assert full.activations > frozen.activations
    for found in (full, lora, frozen):
        rest = found.weights + found.optimizer
        assert rest + max(found.activations, found.gradients) <= found.total
        assert found.total <= rest + found.gradients + found.activations


def test_weights_gradients_and_moments() -> None:
    model = _made(_llama(dtype="bfloat16"))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    # Of each of the 3 × 2 groups a gate, and its noise, output difference and index, which has 8 bytes.
    gates, beside = 6 * 4, 6 * (4 + 4 + 8)
    settings: Any = {"batch_size": 1, "length": 8}
    full = training_memory(model, mode="full", **settings)
    assert full.weights == 4 * numbers + buffers + gates + beside
    assert full.gradients == 4 * numbers + gates
    assert full.optimizer == 8 * numbers + gates
    frozen = training_memory(model, mode="frozen", **settings)
    assert frozen.weights == 2 * numbers + buffers + gates + beside
    assert (frozen.gradients, frozen.optimizer) == (gates, gates)
    lora = training_memory(model, mode="lora", lora_rank=2, **settings)
    widths = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 80) * 3
    adapters = 4 * 3 * 2 * widths
    assert lora.weights == frozen.weights + adapters
    assert (lora.gradients, lora.optimizer) == (gates + adapters, gates + 2 * adapters)
    by_heads = training_memory(model, mode="frozen", unit="head", **settings)
    assert by_heads.gradients == 2 * gates


def test_activations_grow_with_the_batch() -> None:
    """By as much with each row, and much less where layers keep their inputs only."""
    one, two, four = (
        training_memory(_llama(), mode="frozen", batch_size=rows, length=_LENGTH).activations for rows in (1, 2, 4)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    checkpointed = training_memory(
        _llama(), mode="frozen", batch_size=4, length=_LENGTH, gradient_checkpointing=True
    ).activations
    assert checkpointed < 0.6 * four
    longer = training_memory(_llama(), mode="frozen", batch_size=4, length=2 * _LENGTH).activations
    assert longer > 1.9 * four


def test_the_length_is_that_of_training() -> None:
    """Unless it is said: 256, or all positions there are, or a segment."""
    settings: Any = {"mode": "frozen", "batch_size": 2}
    assert training_memory(_llama(), **settings) == training_memory(_llama(), length=64, **settings)
    ours = tiny_config(segment_length=6)
    assert training_memory(ours, **settings) == training_memory(ours, length=6, **settings)


def test_a_model_stays_as_it_is() -> None:
    """One with weights, or with gates, counts as its configuration does."""
    model = _made(_llama()).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings: Any = {"mode": "frozen", "batch_size": 2, "length": _LENGTH}
    expected = training_memory(_llama(), **settings)
    assert training_memory(model, gradient_checkpointing=False, **settings) == expected
    training_memory(model, gradient_checkpointing=True, **settings)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.training and deadhead.gates_of(model) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    learning = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert learning == ["model.embed_tokens.weight"]
    gates = deadhead.attach(model)
    assert training_memory(model, **settings) == expected
    assert deadhead.gates_of(model) is gates


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_no_memory_is_taken(mode: Mode) -> None:
    """Weights of 34 GB, activations of 26 GB, and masks of 67 MB have no contents: the process hardly grows."""
    config = _llama(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=8,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    training_memory(_llama(), mode=mode, batch_size=1, length=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = training_memory(config, mode=mode, batch_size=1, length=8192)
    assert found.total > 40e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_long_masks_take_none_either() -> None:
    """A sliding window's mask is 8192 × 8192, which is not computed."""
    config = tiny_transformers_config("gemma2")
    config.max_position_embeddings = 8192
    training_memory(config, mode="frozen", batch_size=1, length=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert training_memory(config, mode="frozen", batch_size=1, length=8192).activations > 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_what_is_refused() -> None:
    settings: Any = {"mode": "full", "batch_size": 2}
    with pytest.raises(InputError, match="must be 'full', 'lora' or 'frozen', but is 'half'."):
        training_memory(_llama(), **{**settings, "mode": "half"})
    with pytest.raises(InputError, match="need a lora_rank of 1 or more, but it is 0."):
        training_memory(_llama(), **{**settings, "mode": "lora"}, lora_rank=0)
    with pytest.raises(InputError, match="wrong value for 'batch_size'"):
        training_memory(_llama(), **{**settings, "batch_size": 0})
    with pytest.raises(InputError, match="has 64 positions, but a sequence_length of 65"):
        training_memory(_llama(), length=65, **settings)
    with pytest.raises(InputError, match="reads segments of 6 tokens"):
        training_memory(tiny_config(), length=8, **settings)
    with pytest.raises(InputError, match="LoRA is for pretrained models of transformers"):
        training_memory(tiny_config(), **{**settings, "mode": "lora"})
    with pytest.raises(UnsupportedModel):
        training_memory(tiny_transformers_config("mamba"), **settings)


def test_a_step_that_asks_for_values() -> None:
    """A model that goes by what it computed cannot be counted, and the message says what to do."""
    model = _made(_llama())

    def ask(module: nn.Module, args: Any, output: Any) -> None:
        assert bool(output.abs().max() >= 0)

    model.get_input_embeddings().register_forward_hook(ask)
    with pytest.raises(UnsupportedModel, match="type 'llama' cannot be counted, .* measure.$"):
        training_memory(model, mode="full", batch_size=1, length=8)
