"""The All-attention Transformer as a Hugging Face model, and the Transformer-XL to compare it with."""
