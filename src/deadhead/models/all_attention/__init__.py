"""The All-attention Transformer as a Hugging Face model, and the Transformer-XL that it is compared with."""

from deadhead.models.all_attention.configuration import AllAttentionConfig
from deadhead.models.all_attention.modeling import AllAttentionForCausalLM, AllAttentionModel
from deadhead.models.all_attention.transformer_xl import (
    TransformerXLConfig,
    TransformerXLForCausalLM,
    TransformerXLModel,
)

__all__ = [
    "AllAttentionConfig",
    "AllAttentionForCausalLM",
    "AllAttentionModel",
    "TransformerXLConfig",
    "TransformerXLForCausalLM",
    "TransformerXLModel",
]
