"""Callbacks of a Trainer: the sparsity loss, logs, signals, validation."""
