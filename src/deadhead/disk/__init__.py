"""Bytes, safely: files that are whole or absent, JSON that is checked, hashes, stored tensors."""
