"""When a phase compensates, on what, and what it keeps of the dense model for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deadhead.errors import InputError
from deadhead.training import PruneRecipe
from deadhead.training.phases.compensating import calibration_of, dense_copy
from deadhead.training.runs.inputs import NO_TEXT
from tests.compensation.small_pairs import VOCABULARY, dense_model
from tests.random_models import tiny_model
from tests.small_runs import stream

TEXT = stream(400, vocab_size=VOCABULARY)
_ROWS: dict[str, Any] = {"batch_size": 3, "sequence_length": 8}


def test_pretrained_models_are_compensated_and_our_own_where_asked() -> None:
    llama, ours = dense_model("llama"), tiny_model()
    batches = calibration_of(llama, TEXT, PruneRecipe(**_ROWS, compensate_rows=7), seed=0)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 8)] * 3
    again = calibration_of(llama, TEXT, PruneRecipe(**_ROWS, compensate_rows=7), seed=0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert calibration_of(llama, TEXT, PruneRecipe(**_ROWS, compensate=False), seed=0) == []
    recipe = PruneRecipe(batch_size=3, compensate_rows=9)
    assert calibration_of(ours, TEXT, recipe, seed=0) == []
    asked = calibration_of(ours, TEXT, recipe.model_copy(update={"compensate": True}), seed=0)
    # Segment by segment, in the order of the text.
    assert [bool(batch["is_first"].any()) for batch in asked] == [True, False, False]


def test_too_little_text_is_told_only_where_compensation_was_asked_for() -> None:
    llama = dense_model("llama")
    for text in (NO_TEXT, stream(9, vocab_size=VOCABULARY)):
        recipe = PruneRecipe(batch_size=1, sequence_length=8)
        assert calibration_of(llama, text, recipe, seed=0) == []
        with pytest.raises(InputError, match="fewer than two rows"):
            calibration_of(llama, text, recipe.model_copy(update={"compensate": True}), seed=0)


def test_weights_that_do_not_learn_are_not_held_twice() -> None:
    llama = dense_model("llama")
    own = {id(parameter) for parameter in llama.parameters()}
    for changes in ({"freeze_weights": True}, {"criterion": "taylor", "sparsity": 0.5}):
        shared = dense_copy(llama, PruneRecipe(**changes))  # type: ignore[arg-type]
        assert {id(parameter) for parameter in shared.parameters()} == own
    for changes in ({}, {"lora_rank": 2}):
        copied = dense_copy(llama, PruneRecipe(**changes))  # type: ignore[arg-type]
        assert not {id(parameter) for parameter in copied.parameters()} & own
