"""Emptied layers in the form that vLLM takes compute what they did, and ask for no weights that no file has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deadhead.models.pruned.serving import ServedEmptyAttention
from tests.export.small import emptied
from tests.export.test_vllm import KINDS
from tests.random_models import difference

IDS = torch.randint(3, 250, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_served_model_computes_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as vLLM builds it, with its attention's name, here for transformers' own attention."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", sdpa_attention_forward)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "vllm", sdpa_mask)
    model = emptied(kind, **KINDS[kind])
    config = copy.deepcopy(model.config)
    config._attn_implementation = "vllm"
    served: Any = AutoModelForCausalLM.from_config(config).eval()
    assert sum(isinstance(module, ServedEmptyAttention) for module in served.modules()) == 2
    assert not [module for module in served.modules() if isinstance(module, nn.Linear) and not module.weight.numel()]
    found = served.load_state_dict(model.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    with torch.no_grad():
        assert difference(served(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-5


def test_other_attention_leaves_layers_as_they_are() -> None:
    model = emptied("llama")
    assert not [module for module in model.modules() if isinstance(module, ServedEmptyAttention)]
