"""Hugging Face models with heads cut off: what they are made of, how they shrink, and classes that reload them."""
