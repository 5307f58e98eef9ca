"""The All-attention Transformer as a Hugging Face model."""

from deadhead.models.all_attention.configuration import AllAttentionConfig
from deadhead.models.all_attention.modeling import AllAttentionForCausalLM, AllAttentionModel

__all__ = ["AllAttentionConfig", "AllAttentionForCausalLM", "AllAttentionModel"]
