"""Continuous batching of models whose layers differ gives the tokens of `generate`, and leaves nothing behind."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks._tiny_models import VOCABULARY
from deadhead.models.pruned.batching import pad_layers
from tests.models.pruned.uneven_models import uneven_model
from tests.random_models import assert_unchanged, snapshot

# Longer than what is read in one pass, shorter than a sliding window, and between.
LENGTHS = (40, 3, 11, 17)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 1, "pad_token_id": 2}


def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def one_by_one(model: Any) -> list[list[int]]:
    """The tokens that `generate` gives, text by text."""
    texts = [(prompt, model.generate(_row(prompt, model), **GREEDY)) for prompt in prompts()]
    return [ids[0, len(prompt) :].tolist() for prompt, ids in texts]


def _row(prompt: list[int], model: Any) -> Tensor:
    row: Tensor = next(model.parameters()).new_tensor([prompt]).long()
    return row


def in_a_batch(model: Any, **options: Any) -> list[list[int]]:
    """The tokens that `generate_batch` gives, in a cache and with passes too small for all texts at once."""
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    settings: Any = {"generation_config": GenerationConfig(**GREEDY), "continuous_batching_config": small}
    return [output.generated_tokens for output in model.generate_batch(prompts(), **settings, **options).values()]


@pytest.mark.parametrize(
    ("model_type", "emptied"), [("llama", (0,)), ("qwen2", (-1,)), ("gpt2", (0, 1)), ("gemma2", (0,)), ("mistral", ())]
)
def test_a_batch_gives_the_same_tokens_as_text_by_text(model_type: str, emptied: tuple[int, ...]) -> None:
    model = uneven_model(model_type, emptied)
    if model_type == "gemma2":
        # Its scores are capped, which torch's attention cannot do.
        model.set_attn_implementation("eager")
    assert in_a_batch(model) == one_by_one(model)


@pytest.mark.filterwarnings("ignore:The key/value cache grows:UserWarning")
def test_layers_with_more_key_heads_than_the_dense_model() -> None:
    """Where single query heads go, keys and values are repeated; the configuration's number is too small for them."""
    model = uneven_model("llama", unit="head")
    heads = [layer.self_attn.k_proj.out_features // 8 for layer in model.model.layers]
    assert max(heads) > model.config.num_key_value_heads and len(set(heads)) > 1
    assert in_a_batch(model) == one_by_one(model)


def test_a_batch_leaves_the_model_and_its_files_as_they_were(tmp_path: Path) -> None:
    model = uneven_model("llama", (0,))
    model.save_pretrained(tmp_path / "before")
    before, attributes = snapshot(model), set(vars(model))
    in_a_batch(model)
    assert_unchanged(model, before)
    assert set(vars(model)) == attributes
    model.save_pretrained(tmp_path / "after")
    files = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    assert files.keys() == {path.name for path in (tmp_path / "after").iterdir()}
    assert "batching.py" in files
    assert all((tmp_path / "after" / name).read_bytes() == content for name, content in files.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert in_a_batch(again) == one_by_one(model)


def test_a_manager_that_is_kept_serves_again() -> None:
    model = uneven_model("llama", (0,))
    expected = one_by_one(model)
    for _ in range(2):
        assert in_a_batch(model, persistent_manager=True) == expected
        assert one_by_one(model) == expected
    model.destroy_cached_continuous_batching_manager()
    assert in_a_batch(model) == expected


def test_the_cache_is_as_wide_as_the_widest_layer() -> None:
    model = uneven_model("llama", (0,), most=2)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small)
    assert manager.model.config.get_text_config().num_key_value_heads == 2 < model.config.num_key_value_heads
    assert manager.model.config.hidden_size == model.config.hidden_size
    manager.destroy()


@pytest.mark.parametrize(("most", "blocks"), [(8, 0), (1, 16)])
def test_a_kernel_that_writes_to_the_cache_itself_is_left_out_where_layers_differ(most: int, blocks: int) -> None:
    model = uneven_model("llama", (0,), most=most)
    manager: Any = SimpleNamespace(model=model, continuous_batching_config=SimpleNamespace(max_blocks_per_request=16))
    pad_layers(manager, model)
    assert manager.continuous_batching_config.max_blocks_per_request == blocks
