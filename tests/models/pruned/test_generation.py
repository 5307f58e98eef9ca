"""Transformers' caches and loops give the tokens of a cut model that it gives without any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

from benchmarks._tiny_models import VOCABULARY, tiny_model
from tests.models.pruned.uneven_models import uneven_model
from tests.models.test_names import word_tokenizer

PROMPTS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))

# Layers without heads, and without hidden units; sliding windows are shorter than the prompts.
models = pytest.mark.parametrize(
    ("model_type", "emptied", "emptied_feed_forwards"),
    [
        ("llama", (), ()),
        ("llama", (0,), (0,)),
        ("qwen2", (-1,), (1,)),
        ("qwen3", (0,), ()),
        ("gpt2", (0,), (-1,)),
        ("gemma2", (0,), (1,)),
        ("gemma2", (1, -1), ()),
    ],
)


def generated(model: Any, ids: Tensor = PROMPTS, **settings: Any) -> Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    found: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=2, eos_token_id=None, **settings
    )
    return found


@models
def test_caches(model_type: str, emptied: Any, emptied_feed_forwards: Any) -> None:
    model = uneven_model(model_type, emptied, emptied_feed_forwards=emptied_feed_forwards)
    for beams in (1, 3):
        expected = generated(model, use_cache=False, num_beams=beams)
        for way in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
            assert torch.equal(generated(model, num_beams=beams, **way), expected), (beams, way)


@models
def test_padding(model_type: str, emptied: Any, emptied_feed_forwards: Any) -> None:
    model = uneven_model(model_type, emptied, emptied_feed_forwards=emptied_feed_forwards)
    expected = generated(model, PROMPTS[:1, 3:], use_cache=False)[:, 8:]
    mask = torch.ones_like(PROMPTS)
    mask[0, :3] = 0
    for way in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generated(model, attention_mask=mask, **way)[:1, 11:], expected), way


@models
def test_drafts(model_type: str, emptied: Any, emptied_feed_forwards: Any) -> None:
    """A cut model drafts for the dense one, the dense one for it, and so does the prompt: each keeps its tokens."""
    model = uneven_model(model_type, emptied, emptied_feed_forwards=emptied_feed_forwards)
    dense: Any = tiny_model(model_type, seed=7).eval()
    prompt = PROMPTS[:1]
    expected = generated(model, prompt, use_cache=False)
    assert torch.equal(generated(dense, prompt, assistant_model=model), generated(dense, prompt, use_cache=False))
    assert torch.equal(generated(model, prompt, assistant_model=dense), expected)
    assert torch.equal(generated(model, prompt, prompt_lookup_num_tokens=2), expected)


def test_a_pipeline() -> None:
    tokenizer = word_tokenizer()
    model = uneven_model("llama", (0,))
    ids = tokenizer("a", return_tensors="pt")["input_ids"]
    generate: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = generate("a", max_new_tokens=8, do_sample=False, return_tensors=True)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2, use_cache=False)
    assert found["generated_token_ids"] == expected[0].tolist()
