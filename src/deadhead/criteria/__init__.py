"""One-shot criteria: a score for every unit of a trained model, without any training."""
