"""Training on transformers' Trainer: recipes, phases, callbacks, and whole runs."""
