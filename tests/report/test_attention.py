"""Attention patterns: those that the model computes, by the numbers of the dense model's heads."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deadhead import HeadPlan, InputError, cut
from deadhead.checkpoints import checkpoint
from deadhead.data import load_text, load_tokenizer
from deadhead.report.attention import attention_patterns
from tests.small import save_small_llama, save_small_model, write_prose

_SENTENCE = "the cat sees a dog"


def _weights(found: dict[str, Any], layer: str) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(found["layers"][layer]["weights"]), dtype=np.uint8)
    return values.reshape(-1, len(found["tokens"]), len(found["columns"])) / 255


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_patterns_are_the_models_own(kind: str, tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    if kind == "ours":
        save_small_model(tmp_path / "model", text)
    else:
        save_small_llama(tmp_path / "model", text)
    model = checkpoint.load(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    before = model.config._attn_implementation
    found = attention_patterns(model, tokenizer, _SENTENCE)
    assert model.config._attn_implementation == before
    assert "".join(found["tokens"]) == _SENTENCE.replace(" ", "␣")
    assert found["columns"] == [*found["tokens"], *(["persistent vectors"] if kind == "ours" else [])]
    for layer in found["layers"]:
        weights = _weights(found, layer)
        assert found["layers"][layer]["heads"] == [0, 1, 2, 3]
        # Each is rounded to a 255th.
        assert np.abs(weights.sum(-1) - 1).max() < 0.5 / 255 * weights.shape[-1]
        ahead = np.triu(np.ones((len(found["tokens"]),) * 2), 1).astype(bool)
        assert not weights[:, :, : len(found["tokens"])][:, ahead].any(), "nobody reads what comes later"
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        ids = tokenizer(_SENTENCE, return_tensors="pt").input_ids
        own = model(ids, output_attentions=True, use_cache=False).attentions[0][0].numpy()
    assert np.abs(_weights(found, "0")[..., : ids.shape[1]] - own[..., : ids.shape[1]]).max() < 0.51 / 255


def test_heads_of_a_cut_model_keep_their_numbers(tmp_path: Path) -> None:
    save_small_llama(tmp_path / "model", write_prose(tmp_path))
    model, tokenizer = checkpoint.load(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    dense = attention_patterns(model, tokenizer, _SENTENCE)
    cut(model, HeadPlan(kept={0: (1,), 1: (), 2: (0, 1)}, total={0: 2, 1: 2, 2: 2}, unit="kv_group"))
    found = attention_patterns(model, tokenizer, _SENTENCE)
    assert {layer: values["heads"] for layer, values in found["layers"].items()} == {"0": [2, 3], "2": [0, 1, 2, 3]}
    assert all(values["total"] == 4 for values in found["layers"].values())
    # In the first layer nothing was cut before them, so they look where they looked.
    assert np.abs(_weights(found, "0") - _weights(dense, "0")[2:]).max() <= 1 / 255


def test_long_sentences_are_cut_and_bad_ones_refused(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    model = checkpoint.load(save_small_model(tmp_path / "model", text))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert len(attention_patterns(model, tokenizer, "the cat " * 100)["tokens"]) == 48
    with pytest.raises(InputError, match="at least one token"):
        attention_patterns(model, tokenizer, "")
    _, words = load_text(str(text), tokenizer="word")
    model.config.vocab_size = 3
    with pytest.raises(InputError, match="vocabulary"):
        attention_patterns(model, words, "the cat sees")
