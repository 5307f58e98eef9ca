"""Cut checkpoints that are larger than memory: tensors go from file to file, a few megabytes at a time."""
