"""A tiny random model of every causal language model that transformers knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

VOCABULARY = 99
_LAYERS = 3
# What a field of any configuration is set to, where it has one of that name.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "emb_dim", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 8),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 8),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "v_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "swa_v_head_dim", "qk_nope_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mtp_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "d_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "dff"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("max_source_positions", "max_sequence_length", "original_max_position_embeddings"), 256),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 0),
    "eos_token_id": 1,
    "pad_token_id": 2,
    "sliding_window": 8,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "use_cache": True,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "ssm_state_size": 8,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "num_mem_heads": 2,
    "laurel_rank": 4,
    "lm_head_bias": True,
}
_DROPOUTS = ("dropout", "drop_p", "pdrop")
# Fields with one entry a layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "activation_sparsity_pattern")
# What the general rule does not do.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 8},
    "mpt": {"no_bias": False},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "dots3_note": {"adapter_in_dim": 64},
    "dots3_note_text": {"adapter_in_dim": 64},
    "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False},
    "gpt_bigcode": {"multi_query": True},
    "phi": {"partial_rotary_factor": 0.5},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a tiny configuration of a model type of transformers."""
    return _tiny(CONFIG_MAPPING[model_type], _EXCEPTIONS.get(model_type, {}))


def _tiny(kind: type[PreTrainedConfig], exceptions: dict[str, Any]) -> PreTrainedConfig:
    fields = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]
    fields += list(getattr(kind, "__dataclass_fields__", {}))
    fields += list(kind.attribute_map) + list(kind.attribute_map.values())
    given: dict[str, Any] = {name: value for name, value in _SIZES.items() if name in fields}
    for name, other in kind.attribute_map.items():
        # One value for both names of a field.
        if name in given and other in given:
            del given[name]
    if "qk_rope_head_dim" in fields:
        # Multi-head latent attention works its widths out itself.
        given.pop("head_dim", None)
        given["num_key_value_heads"] = given.get("num_attention_heads", 8)
    default = kind()
    for name in fields:
        if name.endswith(_DROPOUTS) and isinstance(value := getattr(default, name, None), (int, float)):
            given[name] = type(value)(0)
    layers = next((given[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in given), _LAYERS)
    for name in _PER_LAYER:
        value = getattr(default, name, None)
        own_name = kind.attribute_map.get(name, name)
        settable = not isinstance(inspect.getattr_static(kind, own_name, None), property)
        if name in fields and settable and isinstance(value, (list, tuple)) and value:
            given[name] = _few(list(value), layers)
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        is_config = isinstance(sub, type) and issubclass(sub, PreTrainedConfig) and hasattr(sub, "model_type")
        if is_config and getattr(default, name, None) is not None:
            given[name] = _tiny(sub if sub.model_type else type(getattr(default, name)), {})
    return kind(**(given | exceptions))


def _few(values: list[Any], layers: int) -> list[Any]:
    """Return one entry of each kind, followed by the most common attention kind, one entry for each layer."""
    kinds = list(dict.fromkeys(str(value) for value in values))
    picked = [next(value for value in values if str(value) == kind) for kind in kinds][:layers]
    while len(picked) < layers:
        picked.append(picked[len(picked) % len(kinds)])
    return picked


def scramble(model: nn.Module, seed: int) -> None:
    """Give every parameter random values, biases, norms and sinks included, so that a mistake in any of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "embed" not in name and "wte" not in name:
                values = values * 1.5 / max(parameter.shape[-1], parameter.shape[-2]) ** 0.5
            elif parameter.ndim == 1:
                values = values * 0.2 + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
            parameter.copy_(values)


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny random model of a type, in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type))
    scramble(model, seed)
    return model.to(dtype).eval()
