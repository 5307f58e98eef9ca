"""Likeness of two models against distributions computed by hand, with and without an output layer left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead import InputError
from deadhead.errors import UnsupportedModel
from deadhead.measure import chunks
from deadhead.measure.likeness import likeness
from tests.criteria.models import batches as own_batches
from tests.criteria.models import llama, scored_batches
from tests.random_models import tiny_model as own_model


def pair() -> tuple[Any, Any]:
    """A Llama, and the same with half of its groups and hidden units gone."""
    model, other = llama(), llama()
    gates = deadhead.attach(other, blocks=True)
    plan = {key: list(range(count // 2)) for key, count in gates.choices.counts.items()}
    deadhead.detach(other)
    return deadhead.cut(other, gates.choices.plan(plan)), model


@pytest.mark.parametrize("in_chunks", [False, True])
def test_it_is_that_of_distributions_computed_by_hand(in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair()
    if in_chunks:
        monkeypatch.setattr(chunks, "AT_ONCE", 300)
    told: list[int] = []
    found = likeness(model, reference, scored_batches(), progress=told.append)
    total, same, tokens = 0.0, 0.0, 0
    for batch in scored_batches():
        ids, counts = batch["input_ids"], batch["scored"][:, 1:]
        with torch.no_grad():
            ours, theirs = (
                log_softmax(each(input_ids=ids).logits[:, :-1].double(), -1)[counts] for each in (model, reference)
            )
        total += float((theirs.exp() * (theirs - ours)).sum())
        same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += int(counts.sum())
    assert found.divergence == pytest.approx(total / tokens, rel=1e-5) and found.divergence > 0
    assert (found.agreement, found.tokens) == (same / tokens, tokens)
    assert told == [*range(1, len(scored_batches()) + 1)]


@pytest.mark.parametrize("own", [False, True])
def test_a_model_is_like_itself(own: bool) -> None:
    model, text = (own_model(), own_batches()) if own else (llama(), scored_batches())
    model.train()
    found = likeness(model, model, text)
    assert found.divergence == pytest.approx(0, abs=1e-6) and found.agreement == 1
    assert model.training


def test_what_cannot_be_compared() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="Models with the same vocabulary were expected"):
        likeness(model, llama(), scored_batches())
    with pytest.raises(InputError, match="no token to compare"):
        likeness(model, model, [])
    with pytest.raises(UnsupportedModel, match="Comparing needs a model that predicts the next token"):
        likeness(model, tiny_model("bert").base_model, [])
