"""A folder's cost without torch is that of its model, number by number; where it may not be, there is none."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks._tiny_models import tiny_config, tiny_model
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.folder_cost import folder_cost
from deadhead.cutting import cut
from deadhead.errors import InputError
from deadhead.layouts import find_layout
from deadhead.measure.cost import config_cost, model_cost
from deadhead.plans.plan import HeadPlan
from deadhead.plans.unit_plan import UnitPlan
from tests.random_models import random_config, random_model, random_plan

_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "gpt2")


def _cut(model: PreTrainedModel, draw: random.Random, *, all_heads: bool) -> None:
    layout = find_layout(model)
    unit = draw.choice(layout.units(model))
    sites = layout.sites(model, unit)
    total = {site.layer: site.total for site in sites}
    hidden = layout.hidden_sites(model)
    units = None
    if hidden and draw.random() < 0.6:
        units = UnitPlan(kept={}, total={site.layer: site.total for site in hidden})
    kept = {layer: tuple(range(count)) for layer, count in total.items()}
    made = random_plan(draw, kept, total, output_scale=False, unit=unit, hidden_units=units)
    if all_heads:
        made = HeadPlan(kept=dict.fromkeys(total, ()), total=total, unit=unit, hidden_units=made.hidden_units)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*key/value cache grows")
        cut(model, made)


def _assert_equal(folder: Path, length: int | None) -> None:
    found = folder_cost(folder, length=length)
    assert found is not None
    model = checkpoint.load(folder)
    assert found == (model_cost(model, length=length), find_layout(model).recorded_plan(model))
    assert found[0] == config_cost(checkpoint.load_config(folder), length=length)


@pytest.mark.parametrize("kind", _TYPES)
def test_models_of_transformers_cost_what_torch_says(kind: str, tmp_path: Path) -> None:
    draw = random.Random(kind)
    for index in range(6):
        changes: dict[str, Any] = {"tie_word_embeddings": draw.random() < 0.5}
        fields: dict[str, Any] = tiny_config(kind).to_dict()
        for name in ("attention_bias", "mlp_bias"):
            if name in fields:
                changes[name] = draw.random() < 0.5
        if "num_key_value_heads" in fields:
            changes["num_key_value_heads"] = draw.choice([1, 2, 4, 8])
        if "n_inner" in fields:
            changes["n_inner"] = draw.choice([None, 48])
        config = tiny_config(kind)
        for name, value in changes.items():
            setattr(config, name, value)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        model = model.to(draw.choice([torch.float32, torch.bfloat16]))
        if index:
            _cut(model, draw, all_heads=index == 1)
        folder = tmp_path / str(index)
        if draw.random() < 0.3:
            model.save_pretrained(folder, max_shard_size="20KB")
        else:
            checkpoint.save(model, folder)
        _assert_equal(folder, draw.choice([None, 0, 3, 5000]))


def test_models_of_ours_cost_what_torch_says(tmp_path: Path) -> None:
    for seed in range(24):
        draw = random.Random(seed)
        config = random_config(draw)
        model = random_model(config, seed)
        if seed % 3:
            _cut(model, draw, all_heads=seed % 6 == 1)
        checkpoint.save(model, tmp_path / str(seed))
        if config.adaptive_cutoffs is None:
            _assert_equal(tmp_path / str(seed), draw.choice([None, 0, 3, 5000]))
        else:
            assert folder_cost(tmp_path / str(seed)) is None


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "opt", "falcon", "gemma2"])
def test_other_structures_have_none(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    assert folder_cost(tmp_path) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 9999},
        {"vocab_size": 98},
        {"dtype": "bfloat16"},
        {"dtype": None},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": "no"},
        {"model_type": "nonsense"},
        {"model_type": ["llama"]},
        {"model_type": "deadhead_llama"},
        {"head_plan": {"version": 1}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_what_the_configuration_and_the_tensors_disagree_on_has_none(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert folder_cost(tmp_path) is not None
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert folder_cost(tmp_path) is None


def test_windows_have_none(tmp_path: Path) -> None:
    config: Any = tiny_config("qwen2")
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.use_sliding_window, config.sliding_window = True, 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert folder_cost(tmp_path) is None


def test_damaged_and_missing_weights_have_none(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert folder_cost(tmp_path) is None
    weights.unlink()
    assert folder_cost(tmp_path) is None
    assert folder_cost(tmp_path / "none") is None


def test_a_configuration_of_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "else/where"}))
    with pytest.raises(InputError, match="code of the Hugging Face hub"):
        folder_cost(tmp_path)
