"""What onnxruntime-genai must be told to continue texts with an ONNX file that `write_onnx` wrote."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from deadhead.export import onnx

FILE = "genai_config.json"


def genai_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return the content of `genai_config.json`.

    The numbers of heads stand there once for all layers; genai takes each layer's own from the file's inputs.
    """
    config: Any = model.config.get_text_config()
    generation: Any = model.generation_config
    special = {name: getattr(generation, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ids = {f"{name}_token_id": token for name, token in special.items() if token is not None}
    length = getattr(config, "max_position_embeddings", None) or 2**17
    heads = config.num_attention_heads
    return {
        "model": {
            # Its name for any decoder that takes token ids, a mask, positions and a cache.
            "type": "decoder",
            "context_length": length,
            "vocab_size": config.vocab_size,
            **ids,
            "decoder": {
                "session_options": {},
                "filename": onnx.FILE,
                "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The cache is a new tensor each time: one that is shared would have to be of the greatest length.
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
