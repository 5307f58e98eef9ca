"""A prefix that was learned for the dense model's heads goes on with those that a cut leaves."""

from __future__ import annotations

import random
from typing import Any

import peft
import pytest
import torch

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
