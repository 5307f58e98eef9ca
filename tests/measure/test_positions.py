"""Positions of a model, against whether it runs on texts that long."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers

from deadhead import InputError
from deadhead.measure.positions import max_positions, require_positions


@pytest.mark.parametrize(
    ("name", "sizes", "positions"),
    [
        ("GPT2LMHeadModel", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12}, 12),
        ("RobertaForCausalLM", {"hidden_size": 8, "pad_token_id": 1, "is_decoder": True}, 10),
        ("OPTForCausalLM", {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8}, 12),
        ("BertModel", {"hidden_size": 8}, 12),
        ("GPTJForCausalLM", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12, "rotary_dim": 4}, 12),
        ("CTRLLMHeadModel", {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12, "dff": 8}, 12),
        ("LlamaForCausalLM", {"hidden_size": 8}, None),
        ("ViTModel", {"hidden_size": 8}, None),
    ],
)
def test_a_text_must_not_be_longer_than_a_table_of_positions(
    name: str, sizes: dict[str, Any], positions: int | None
) -> None:
    kind: Any = getattr(transformers, name)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 12}
    # Some configurations have one field under two names.
    given = sizes if "n_embd" in sizes else {**shape, **sizes}
    model = kind(kind.config_class(vocab_size=29, bos_token_id=0, eos_token_id=1, **given)).eval()
    for length in (positions or 99, (positions or 99) + 1):
        if positions is None or length == positions:
            require_positions(model, length, of="A text")
        else:
            with pytest.raises(InputError, match=f"A text would have {length} tokens, .* has {positions} positions"):
                require_positions(model, length, of="A text")
            assert max_positions(model) == positions
        if name != "ViTModel":
            ids = torch.full((1, length), 5)
            with nullcontext() if length != (positions or 0) + 1 else pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)
