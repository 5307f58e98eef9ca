"""Tiny dense models of several architectures, the same cut by hand, and text that the dense ones wrote themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import deadhead
from deadhead.attaching import attach
from deadhead.gates.hard_concrete import GateConfig
from tests.random_models import randomise, tiny_model

VOCABULARY = 29
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_GROUPED: dict[str, Any] = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}


def _make(kind: str) -> Any:
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    makers: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **_GPT2, **ends)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, intermediate_size=48, **ends)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, **ends)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, head_dim=8)),
        "bert": lambda: BertForMaskedLM(BertConfig(**_SIZES, intermediate_size=48)),
        "all-attention": tiny_model,
        "transformer-xl": lambda: tiny_model(num_persistent=0, feed_forward_size=24),
    }
    return makers[kind]()


KINDS = ("llama", "gpt2", "neox", "opt", "gemma2", "bert", "all-attention", "transformer-xl")


def dense_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose every parameter is random."""
    model = _make(kind)
    randomise(model, 0)
    return model.eval().to(dtype)


def cut_by_hand(dense: Any, *, emptied: bool = False) -> Any:
    """Return a copy without the first head and hidden units of each layer, and perhaps without all of layer 1's."""
    model = copy.deepcopy(dense)
    gates = attach(model, config=GateConfig(output_scale=False), blocks=_has_blocks(dense))
    with torch.no_grad():
        for key, gate in gates:
            gone = slice(None) if emptied and key.layer == 1 else slice(0, max(1, len(gate.log_alpha_bias) // 6))
            gate.log_alpha_bias[gone] = -1e4
    return deadhead.cut(model, gates.plan())


def _has_blocks(dense: Any) -> bool:
    return bool(dense.config.model_type != "all_attention")


def text_of(dense: Any, *, rows: int = 48, length: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of text that a model draws from its own distribution; for models that cannot, random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    if dense.can_generate():
        with torch.no_grad():
            for place in range(1, length):
                last = dense(input_ids=ids[:, :place], use_cache=False).logits[:, -1].float()
                ids[:, place] = torch.multinomial(last.softmax(-1), 1, generator=generator)[:, 0]
    if not hasattr(dense.config, "memory_length"):
        return [{"input_ids": part} for part in ids.split(8)]
    # Each row goes on from segment to segment.
    step = dense.config.segment_length
    starts = range(0, length - step, step)
    return [
        {
            "input_ids": ids[:, start : start + step],
            "labels": ids[:, start + 1 : start + step + 1],
            "is_first": torch.full((rows,), start == 0),
        }
        for start in starts
    ]
