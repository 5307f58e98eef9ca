"""One-shot criteria: a score for every unit from one look at a trained model, without training anything."""
