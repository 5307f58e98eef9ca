"""Small random models of transformers, cut by random plans of heads and blocks, for the exports."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deadhead
from deadhead.plans.plan import HeadPlan
from deadhead.plans.unit_plan import UnitPlan
from tests.random_models import random_units, randomise

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 8,
    "n_positions": 256,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Configurations that read a head's width though they do not name it, or do not read it.
_READS_WIDTH = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def dense_model(kind: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a model of a type of transformers in evaluation mode, every parameter random."""
    known = set(AutoConfig.for_model(kind).to_dict()) | ({"head_dim"} if kind in _READS_WIDTH else set())
    sizes = {name: value for name, value in SIZES.items() if name in known}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **fields}))
    randomise(model, seed)
    return model.eval()


def cut_model(kind: str, seed: int = 0, *, unit: Any = None, blocks: bool = True, **fields: Any) -> PreTrainedModel:
    """Return such a model with a random part of its heads, and of its blocks, cut off."""
    model = dense_model(kind, seed, **fields)
    gates = deadhead.attach(model, unit=unit, blocks=32 if blocks else False)
    plan = random_units(random.Random(seed), gates, output_scale=False)
    deadhead.detach(model)
    return deadhead.cut(model, plan)


def cut_by(kind: str, counts: list[int], **fields: Any) -> PreTrainedModel:
    """Return such a model with the first so many key/value groups of each layer left."""
    model = dense_model(kind, **fields)
    kept = {layer: range(count) for layer, count in enumerate(counts)}
    plan = HeadPlan(kept=kept, total=dict.fromkeys(kept, 4), unit="kv_group")
    return deadhead.cut(copy.deepcopy(model), plan)


def emptied(kind: str, **fields: Any) -> PreTrainedModel:
    """Return a model of which the first and third layers lost all heads, the second all hidden units."""
    # vLLM's attention on CPUs knows widths of heads from 32.
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "vocab_size": 258, **fields}
    model = dense_model(kind, **{name: value for name, value in sizes.items() if kind == "opt" or "proj" not in name})
    plan = deadhead.attach(model).plan()
    deadhead.detach(model)
    kept = {0: [], 1: [0, 2], 2: [], 3: [1]}
    units = {0: range(0, 128, 2), 1: [], 2: range(128), 3: range(96)}
    hidden = UnitPlan(kept=units, total=dict.fromkeys(units, 128))
    return deadhead.cut(model, dataclasses.replace(plan, kept=kept, hidden_units=hidden))
