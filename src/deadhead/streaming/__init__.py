"""Cut checkpoints that are larger than memory: tensors are copied from file to file, a few megabytes at a time."""
