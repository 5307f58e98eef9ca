"""A cut model's configuration tells each layer's numbers, and keeps the dense model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from benchmarks._tiny_models import tiny_model
from deadhead.attaching import attach, detach
from deadhead.checkpoints import checkpoint
from deadhead.cutting import cut
from deadhead.models.pruned.feed_forward import WIDTHS, find_feed_forwards
from deadhead.models.pruned.structure import find_attentions, head_order
from tests.export.small import cut_model
from tests.random_models import difference

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


@pytest.mark.parametrize("kind", ["gemma4_text", "lfm3", "dots3_note_text", "gemma3", "mimo_v2_flash"])
def test_layers_that_differ_without_a_plan_are_told_as_the_dense_model_tells_them(kind: str, tmp_path: Path) -> None:
    """Or whose configuration is that of a larger model: they are cut, saved, loaded and run."""
    if kind not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    model: Any = tiny_model(kind)
    gates = attach(model)
    detach(model)
    units = {key: tuple(heads) for key, heads in gates.choices.units.items()}
    first = next(iter(units))
    cut(model, gates.choices.plan_of({**units, first: units[first][:1]}))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        settings: Any = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        continued = model.generate(ids, **settings)
        model.config.validate()
        checkpoint.save(model, tmp_path / "model")
        loaded = checkpoint.load(tmp_path / "model")
        assert difference(loaded(input_ids=ids).logits, expected) < 1e-5
        assert torch.equal(loaded.generate(ids, **settings), continued)
