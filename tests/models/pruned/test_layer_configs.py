"""A cut model's configuration tells each layer's numbers, and keeps the dense model's."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from deadhead.checkpoints import checkpoint
from deadhead.models.pruned.feed_forward import WIDTHS, find_feed_forwards
from deadhead.models.pruned.structure import find_attentions, head_order
from tests.export.small import cut_model

KINDS = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt2", "gpt_neox")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_its_own_numbers(kind: str, seed: int, tmp_path: Path) -> None:
    """Also after a file, in which they are not written down once more."""
    model = cut_model(kind, seed, **({"sliding_window": 16} if kind == "gemma2" else {}))
    head_dim = next(each.head_dim for each in find_attentions(model)[0])
    attentions = {each.key: each for each in find_attentions(model)[0]}
    widths = {each.key: each.width for each in find_feed_forwards(model)}
    checkpoint.save(model, tmp_path / "model")
    assert "per_layer_config" not in (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    for config in (model.config, AutoConfig.from_pretrained(tmp_path / "model")):
        assert config.is_heterogeneous and len(config.per_layer_config) == config.num_hidden_layers
        for index, layer in enumerate(config.per_layer_config):
            attention = attentions.get(index)
            # A cache has some place for a layer without heads.
            num_kv_heads = 1 if attention is None else attention.num_kv_heads
            assert getattr(layer, "num_key_value_heads", layer.num_attention_heads) == num_kv_heads
            if attention is not None:
                assert layer.num_attention_heads == attention.num_heads
                assert len(head_order("query", attention.num_heads, num_kv_heads)) == layer.num_attention_heads
            assert layer.head_dim == head_dim
            assert {getattr(layer, name, widths[index]) for name in WIDTHS} == {widths[index]}
            assert not layer.is_heterogeneous
        assert config.num_attention_heads == 8


def test_a_configuration_without_a_plan_is_one_for_all_layers() -> None:
    config = type(cut_model("llama").config)()
    assert not config.is_heterogeneous
    assert [layer.num_attention_heads for layer in config.per_layer_config] == [32] * config.num_hidden_layers
