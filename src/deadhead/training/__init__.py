"""Training on transformers' Trainer: recipes, phases, the sparsity callback, whole runs, and a phase in one call."""

from deadhead.training.callbacks.sparsity import SparsityCallback
from deadhead.training.phases.choosing import attach_gates, close_to_budget, gate_config
from deadhead.training.phases.one_shot import rank
from deadhead.training.phases.phase import PhaseRun, train
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, Recipe, load_recipe
from deadhead.training.runs.one_call import finetune, prune
from deadhead.training.runs.results import Pruned, Trained
from deadhead.training.runs.run import Run
from deadhead.training.runs.single import Options

__all__ = [
    "DataRecipe",
    "ModelRecipe",
    "Options",
    "PhaseRecipe",
    "PhaseRun",
    "PruneRecipe",
    "Pruned",
    "Recipe",
    "Run",
    "SparsityCallback",
    "Trained",
    "attach_gates",
    "close_to_budget",
    "finetune",
    "gate_config",
    "load_recipe",
    "prune",
    "rank",
    "train",
]
