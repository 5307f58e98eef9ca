"""Models of ours written down as the paper authors' released code would: its names, in its kinds of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks._tiny_models import scramble
from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM

CUTOFFS, VOCABULARY, WIDTH, HEADS = [12, 24, 40], 60, 64, 4

State = dict[str, Tensor]


def random_model(**values: Any) -> AllAttentionForCausalLM:
    make: Any = AllAttentionConfig
    config = make(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_persistent=6,
        memory_length=8,
        segment_length=8,
        attend_initial_memory=True,
        final_layer_norm=False,
        lm_head_bias=True,
        **values,
    )
    model = AllAttentionForCausalLM(config)
    scramble(model, 3)
    return model.eval()


def authors_state(model: AllAttentionForCausalLM) -> State:
    """Write a model of ours down in the authors' names, with gates of which each layer's head 1 is closed."""
    ours = {name: value.clone() for name, value in model.state_dict().items()}
    state: State = {}
    for layer in range(2):
        mine, attention = f"model.layers.{layer}", f"model.layers.{layer}.attention"
        for letter in "qkvr":
            state[f"layers.{layer}.attn.{letter}_proj.weight.data"] = ours[f"{attention}.{letter}_proj.weight"]
        state[f"layers.{layer}.attn.r_query_bias.data"] = ours[f"{attention}.content_bias"].flatten()
        state[f"layers.{layer}.attn.r_pos_bias.data"] = ours[f"{attention}.position_bias"].flatten()
        state[f"layers.{layer}.attn.mem_k.data"] = ours[f"{attention}.persistent_k"][None]
        state[f"layers.{layer}.attn.mem_v.data"] = ours[f"{attention}.persistent_v"][None]
        state[f"layers.{layer}.attn.gate.gate.data"] = torch.tensor([3.0, -5.0, 2.5, 4.0])
        state[f"layers.{layer}.norm.weight.data"] = ours[f"{mine}.norm.weight"] - 1
        state[f"layers.{layer}.norm.bias.data"] = ours[f"{mine}.norm.bias"]
        state[f"layers.{layer}.projection.linear.weight.data"] = ours[f"{attention}.o_proj.weight"]
        state[f"layers.{layer}.projection.linear.bias.data"] = ours[f"{attention}.o_proj.bias"]
    # Their table goes on beyond the window, with rows for greater distances before ours.
    state["pos_emb.data"] = torch.cat([torch.randn(9, WIDTH), ours["model.position_table"]])[None]
    embedding, output = "model.embed_tokens", "lm_head"
    if model.config.adaptive_cutoffs is None:
        state["word_emb.weight.data"] = ours[f"{embedding}.weight"]
        state["criterion.project.weight.data"] = ours[f"{output}.weight"]
        state["criterion.project.bias.data"] = ours[f"{output}.bias"]
        return state
    state["criterion.cluster.weight.data"] = ours[f"{output}.cluster.weight"]
    state["criterion.cluster.bias.data"] = ours[f"{output}.cluster.bias"]
    for rank in range(len(CUTOFFS) + 1):
        part = "shortlist" if rank == 0 else f"tail.{rank - 1}"
        state[f"word_emb.{part}.0.weight.data"] = ours[f"{embedding}.tables.{rank}.weight"]
        state[f"word_emb.{part}.1.weight.data"] = ours[f"{embedding}.projections.{rank}.weight"]
        state[f"criterion.{part}.0.weight.data"] = ours[f"{output}.projections.{rank}.weight"]
        state[f"criterion.{part}.1.weight.data"] = ours[f"{output}.tables.{rank}.weight"]
        state[f"criterion.{part}.1.bias.data"] = ours[f"{output}.tables.{rank}.bias"]
    return state


def write_state(state: State, path: Path) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{f"sd/{name}": value.numpy() for name, value in state.items()})  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    else:
        # As a training checkpoint of several GPUs has it.
        values = {f"module.{name.removesuffix('.data')}": value for name, value in state.items()}
        torch.save({"iter": 3, "model": values, "optimizer": {"state": {}, "lr": 0.1}}, path)
    return path


def plain_names(state: State) -> State:
    return {name.removesuffix(".data"): value for name, value in state.items()}
