"""Training on transformers' Trainer: recipes, phases, the sparsity callback, and whole runs."""

from deadhead.training.callbacks.sparsity import SparsityCallback
from deadhead.training.phases.choosing import attach_gates, close_to_budget, gate_config
from deadhead.training.phases.phase import rank, train
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe, Recipe, load_recipe
from deadhead.training.runs.run import Run

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
