"""Costs on paper against models as they are: real parameters, real caches, torch's own count of products."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

import deadhead
from deadhead import HeadPlan, UnsupportedModel
from deadhead.errors import InputError
from deadhead.measure.cost import config_cost, counted_costs, model_cost
from deadhead.measure.costs import Cost
from deadhead.plans.unit_plan import UnitPlan
from tests.random_models import random_config, random_model, random_plan, tiny_config, tiny_model


def _real_parameters(model: torch.nn.Module) -> int:
    return sum({id(parameter): parameter.numel() for parameter in model.parameters()}.values())


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_costs_what_the_cut_model_costs(seed: int) -> None:
    draw = random.Random(seed)
    config = random_config(draw)
    model = random_model(config, seed)
    total = dict.fromkeys(range(config.num_hidden_layers), config.num_attention_heads)
    everything = {layer: range(count) for layer, count in total.items()}
    plan = random_plan(draw, everything, total, output_scale=False)
    dense = model_cost(model)
    assert dense.parameters == _real_parameters(model)
    foretold = model_cost(model, plan)
    deadhead.cut(model, plan)
    assert model_cost(model) == foretold
    assert foretold.parameters == _real_parameters(model)
    assert foretold.heads == plan.heads
    assert foretold.total_heads == list(total.values())
    assert dense.parameters - foretold.parameters == dense.attention_parameters - foretold.attention_parameters


@pytest.mark.parametrize("length", [None, 0, 3, 100])
def test_flops_fall_in_proportion_to_the_heads(length: int | None) -> None:
    model = tiny_model()
    dense = model_cost(model, length=length)
    for kept in range(5):
        plan = HeadPlan(kept={0: range(kept), 1: (), 2: range(4 - kept)}, total=dict.fromkeys(range(3), 4))
        cost = model_cost(model, plan, length=length)
        assert cost.attention_flops_per_token == pytest.approx(dense.attention_flops_per_token * 4 / 12, rel=1e-12)
        assert cost.attention_parameters * 12 == dense.attention_parameters * 4
        rest = dense.flops_per_token - dense.attention_flops_per_token
        assert cost.flops_per_token == pytest.approx(rest + cost.attention_flops_per_token, rel=1e-12)
        assert rest == 2 * 29 * 16  # the output layer


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("plan", [None, HeadPlan(kept={0: (1,), 1: ()}, total=dict.fromkeys(range(3), 4))])
def test_products_agree_with_torchs_own_count(position: str, plan: HeadPlan | None) -> None:
    """One token each of two texts after a full cache: every product; W_R p is kept with the cache."""
    model = tiny_model(position=position, attn_implementation="eager").requires_grad_(False)
    config = model.config
    if plan is not None:
        deadhead.cut(model, plan)
    with torch.no_grad():
        cache = model(input_ids=torch.zeros((2, 9), dtype=torch.long), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.zeros((2, 1), dtype=torch.long), past_key_values=cache, use_cache=True)
    expected = 2 * model_cost(model, length=config.memory_length).flops_per_token
    assert counter.get_total_flops() == expected


def test_a_longer_text_costs_more_up_to_the_window() -> None:
    model = tiny_model()
    by_length = [model_cost(model, length=length) for length in (0, 1, 5, 6, 1000)]
    flops = [cost.flops_per_token for cost in by_length]
    assert flops[0] < flops[1] < flops[2] == flops[3] == flops[4]
    assert model_cost(model) == by_length[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4, 5, 30])
def test_cache_bytes_are_those_of_the_cache(dtype: torch.dtype, length: int) -> None:
    model = deadhead.cut(tiny_model(), HeadPlan(kept={0: (1, 2, 3), 2: (0,)}, total=dict.fromkeys(range(3), 4)))
    model = model.to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        # Token by token, as a text is generated.
        cache = None
        for _ in range(length):
            cache = model(input_ids=torch.zeros((1, 1), dtype=torch.long), past_key_values=cache, use_cache=True)
            cache = cache.past_key_values
    assert cache is not None
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * dtype.itemsize
    assert model_cost(model, length=length).kv_cache_bytes == held


def test_an_emptied_layer_caches_nothing_but_its_length() -> None:
    model = tiny_model()
    plan = HeadPlan(kept={0: (), 1: (), 2: ()}, total=dict.fromkeys(range(3), 4))
    assert model_cost(model, plan).kv_cache_bytes == 0
    assert model_cost(model, plan).attention_flops_per_token == 0


def test_gates_are_not_counted() -> None:
    model = tiny_model()
    before = model_cost(model)
    deadhead.attach(model)
    assert model_cost(model) == before


@pytest.mark.parametrize("overrides", [{}, {"adaptive_cutoffs": [5]}, {"tie_word_embeddings": False}])
def test_on_the_meta_device(overrides: dict[str, Any]) -> None:
    config = tiny_config(**overrides)
    plan = HeadPlan(kept={1: (0,)}, total=dict.fromkeys(range(3), 4))
    model = tiny_model(**overrides)
    assert config_cost(config) == model_cost(model)
    assert config_cost(config, plan, length=3) == model_cost(model, plan, length=3)
    # Far larger than this machine: nothing is held in memory.
    huge = config_cost(tiny_config(hidden_size=2**15, num_hidden_layers=64, num_persistent=2**14))
    assert huge.parameters > 10**11


def test_of_a_cut_models_configuration() -> None:
    model = deadhead.cut(tiny_model(), HeadPlan(kept={1: (0, 2)}, total=dict.fromkeys(range(3), 4)))
    assert config_cost(model.config) == model_cost(model)
    assert isinstance(model_cost(model), Cost)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (dict.fromkeys(range(3), 6), r"is for \[6, 6, 6\] hidden units a layer, but this model had \[5, 5, 5\]"),
        ({0: 5}, r"is for \[5\] hidden units a layer"),
        (dict.fromkeys(range(3), 5), "keeps hidden unit 2 of layer 0, but that hidden unit was cut before"),
    ],
)
def test_a_plan_of_another_model_is_refused(width: dict[int, int], message: str) -> None:
    total = dict.fromkeys(range(3), 4)
    first = UnitPlan(kept={0: [0, 1]}, total=dict.fromkeys(range(3), 5))
    model = deadhead.cut(tiny_model(), HeadPlan(kept={}, total=total, hidden_units=first))
    with pytest.raises(InputError, match=message):
        model_cost(model, HeadPlan(kept={}, total=total, hidden_units=UnitPlan(kept={}, total=width)))


def test_embeddings_tied_and_not() -> None:
    tied, untied = model_cost(tiny_model()), model_cost(tiny_model(tie_word_embeddings=False))
    assert tied.embedding_parameters == 29 * 16
    assert untied.embedding_parameters == 2 * 29 * 16
    assert untied.parameters - tied.parameters == 29 * 16


def test_an_unknown_architecture_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    with pytest.raises(UnsupportedModel, match="cannot prune heads of models of type 'mamba'"):
        model_cost(MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)))


_STACK = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
_TEXT = {**_STACK, "vocab_size": 29, "max_position_embeddings": 32}
_CACHES: dict[str, tuple[Callable[[], Any], bool]] = {
    "encoder": (lambda: BertModel(BertConfig(**_TEXT)), False),
    "encoder with a head": (lambda: BertForSequenceClassification(BertConfig(**_TEXT)), False),
    "encoder as a decoder": (lambda: BertModel(BertConfig(**_TEXT, is_decoder=True)), True),
    "images": (lambda: ViTModel(ViTConfig(**_STACK, image_size=8, patch_size=4)), False),
    "decoder without a head": (lambda: LlamaModel(LlamaConfig(**_TEXT)), True),
    "classifying decoder": (lambda: LlamaForSequenceClassification(LlamaConfig(**_TEXT, pad_token_id=0)), True),
}


@pytest.mark.parametrize("name", _CACHES)
def test_a_cache_is_counted_where_there_is_one(name: str) -> None:
    make, keeps = _CACHES[name]
    model = make().eval()
    if model.main_input_name == "input_ids":
        with torch.no_grad():
            output = model.base_model(input_ids=torch.zeros((1, 5), dtype=torch.long), use_cache=True)
        assert (output.past_key_values is not None) == keeps
    plan = HeadPlan(kept={0: (1,), 1: (0, 2)}, total={0: 4, 1: 4})
    cost, cut = model_cost(model, length=5), model_cost(model, plan, length=5)
    assert (cost.kv_cache_bytes, cut.kv_cache_bytes) == ((2 * 2 * 16 * 5 * 4, 2 * 12 * 5 * 4) if keeps else (0, 0))
    if keeps:
        assert counted_costs(model, "kv_cache", unit="head", length=5).total == cost.kv_cache_bytes
        return
    message = "A budget of kv_cache needs a model that keeps a key/value cache, but .* keeps none"
    with pytest.raises(InputError, match=message):
        counted_costs(model, "kv_cache", unit="head", length=5)
    with pytest.raises(InputError, match=message):
        deadhead.prune(model, criterion="magnitude", kv_cache=0.5)
