"""Safe access to files: files that are whole or absent, checked JSON, hashes, stored tensors."""
