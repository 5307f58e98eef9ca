"""Transformer-XL (Dai et al. 2019), the baseline that the All-attention Transformer is compared with.

It is the same model, line by line, but each layer has a feed-forward layer, and its heads have no persistent vectors.
With a feed-forward layer as wide as the persistent vectors are many, both have the same number of weights but for the
feed-forward layer's biases and norm.

Imports torch and transformers only, never deadhead: these files travel with checkpoints.
"""

from __future__ import annotations

from .configuration import AllAttentionConfig
from .modeling import AllAttentionForCausalLM, AllAttentionModel


class TransformerXLConfig(AllAttentionConfig):
    """A Transformer-XL language model; see `AllAttentionConfig` for every field.

    Args:
        num_persistent: 0.
        feed_forward_size: width of the feed-forward layers.
    """

    model_type = "deadhead_transformer_xl"

    num_persistent: int = 0
    feed_forward_size: int = 512

    def validate_architecture(self) -> None:
        """Check the sizes as `AllAttentionConfig` does, and that they are a Transformer-XL's."""
        super().validate_architecture()
        if self.num_persistent or not self.feed_forward_size:
            raise ValueError(
                "A Transformer-XL has no persistent vectors and a feed-forward layer, but num_persistent is "
                f"{self.num_persistent} and feed_forward_size {self.feed_forward_size}."
            )


class TransformerXLModel(AllAttentionModel):
    """Embeddings, layers and the last norm, without an output layer."""

    config: TransformerXLConfig
    config_class = TransformerXLConfig


class TransformerXLForCausalLM(AllAttentionForCausalLM):
    """The language model."""

    config: TransformerXLConfig
    config_class = TransformerXLConfig
