"""Training on transformers' Trainer: recipes, phases, the sparsity callback, and whole runs."""

from deadhead.training.choosing import attach_gates, close_to_budget, gate_config
from deadhead.training.phases import rank, train
from deadhead.training.recipe import PhaseRecipe, PruneRecipe, Recipe, load_recipe
from deadhead.training.run import Run
from deadhead.training.sparsity import SparsityCallback

__all__ = [
    "PhaseRecipe",
    "PruneRecipe",
    "Recipe",
    "Run",
    "SparsityCallback",
    "attach_gates",
    "close_to_budget",
    "gate_config",
    "load_recipe",
    "rank",
    "train",
]
