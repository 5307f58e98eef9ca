"""Dense, gated and cut models on disk, and the checks before one is loaded."""
