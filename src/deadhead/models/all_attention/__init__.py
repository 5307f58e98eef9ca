"""The All-attention Transformer as a Hugging Face model, and the Transformer-XL that it is compared with."""
