"""What a Trainer calls: the sparsity loss, logs, signals, validation."""
