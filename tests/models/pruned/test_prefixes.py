"""A prefix that was learned for the dense model's heads goes on with those that a cut leaves."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

import deadhead
from tests.export.small import dense_model
from tests.random_models import difference, random_units

IDS = torch.randint(3, 250, (2, 13), generator=torch.Generator().manual_seed(1))
# PEFT's own.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
# PEFT divides the width among the heads.
_SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 32}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_a_prefix_of_the_dense_model_is_one_of_the_cut_model(kind: str, seed: int) -> None:
    """With closed gates and with the heads cut off the same is computed, token by token too."""
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256} if kind == "opt" else _SIZES
    model = dense_model(kind, seed, **sizes)
    torch.manual_seed(seed)
    prefixed: Any = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prefixed.eval()
    gates = deadhead.attach(model)
    plan = random_units(random.Random(seed), gates, output_scale=False)
    gates.set_plan(plan)
    settings: Any = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        continued = prefixed.generate(input_ids=IDS, **settings)
        expected = prefixed(input_ids=IDS).logits
        alone = model(input_ids=IDS).logits
        deadhead.detach(model)
        deadhead.cut(model, plan)
        assert difference(prefixed(input_ids=IDS).logits, expected) < 1e-5
        assert difference(alone, expected) > 1e-3
        assert torch.equal(prefixed.generate(input_ids=IDS, **settings), continued)


def test_a_prefix_with_as_many_copies_as_there_were_heads() -> None:
    """Single query heads leave key/value heads to be kept twice: here as many as there were, but not those."""
    model = dense_model("llama", **_SIZES)
    prefixed: Any = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prefixed.eval()
    gates = deadhead.attach(model, unit="head")
    plan = replace(gates.plan(), kept={**gates.plan().kept, 0: (0, 1, 2, 4)})
    gates.set_plan(plan)
    with torch.no_grad():
        expected = prefixed(input_ids=IDS).logits
        deadhead.detach(model)
        deadhead.cut(model, plan)
        assert difference(prefixed(input_ids=IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("is_tuple", [False, True])
def test_a_cache_of_its_own_is_left_as_it_is(is_tuple: bool) -> None:
    """Falcon's keys are repeated for each query head, so a layer of fewer looks like the dense model's."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 4}
    config = FalconConfig(vocab_size=300, new_decoder_architecture=True, alibi=False, **sizes)
    model: Any = FalconForCausalLM(config).eval()
    plan = deadhead.attach(model).plan()
    deadhead.detach(model)
    deadhead.cut(model, replace(plan, kept={0: (0, 1), 1: (0, 1, 2)}))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[:, -1]
        first = model(input_ids=IDS[:, :-1], use_cache=True, return_dict=not is_tuple)
        found = model(input_ids=IDS[:, -1:], past_key_values=first[1]).logits[:, -1]
    assert difference(found, expected) < 1e-5


def test_a_text_that_the_dense_model_has_read_goes_on() -> None:
    model = dense_model("llama")
    gates = deadhead.attach(model)
    plan = random_units(random.Random(1), gates, output_scale=False)
    gates.set_plan(plan)
    with torch.no_grad():
        dense = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
        expected = model(input_ids=IDS[:, 6:], past_key_values=copy.deepcopy(dense)).logits
        deadhead.detach(model)
        deadhead.cut(model, plan)
        assert difference(model(input_ids=IDS[:, 6:], past_key_values=dense).logits, expected) < 1e-5
