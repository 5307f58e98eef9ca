"""Training on transformers' Trainer: recipes, phases, the sparsity callback, whole runs, and a phase in one call.

Names are loaded on first use, so recipes and the help of the command line need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deadhead.training.callbacks.sparsity import SparsityCallback as SparsityCallback
    from deadhead.training.phases.choosing import attach_gates as attach_gates
    from deadhead.training.phases.choosing import close_to_budget as close_to_budget
    from deadhead.training.phases.choosing import gate_config as gate_config
    from deadhead.training.phases.frozen import FrozenWeightsTrainer as FrozenWeightsTrainer
    from deadhead.training.phases.phase import PhaseRun as PhaseRun
    from deadhead.training.phases.phase import train as train
    from deadhead.training.phases.ranking import rank as rank
    from deadhead.training.phases.ranking import rank_each as rank_each
    from deadhead.training.recipes.reading import load_recipe as load_recipe
    from deadhead.training.recipes.recipe import DataRecipe as DataRecipe
    from deadhead.training.recipes.recipe import ModelRecipe as ModelRecipe
    from deadhead.training.recipes.recipe import PhaseRecipe as PhaseRecipe
    from deadhead.training.recipes.recipe import PruneRecipe as PruneRecipe
    from deadhead.training.recipes.recipe import Recipe as Recipe
    from deadhead.training.runs.options import Options as Options
    from deadhead.training.runs.results import Pruned as Pruned
    from deadhead.training.runs.results import Trained as Trained
    from deadhead.training.runs.run import Run as Run
    from deadhead.training.runs.single import finetune as finetune
    from deadhead.training.runs.single import prune as prune
    from deadhead.training.runs.sweeping import Sweep as Sweep
    from deadhead.training.runs.sweeping import sweep as sweep

_NAMES = {
    "callbacks.sparsity": ("SparsityCallback",),
    "phases.choosing": ("attach_gates", "close_to_budget", "gate_config"),
    "phases.frozen": ("FrozenWeightsTrainer",),
    "phases.phase": ("PhaseRun", "train"),
    "phases.ranking": ("rank", "rank_each"),
    "recipes.reading": ("load_recipe",),
    "recipes.recipe": ("DataRecipe", "ModelRecipe", "PhaseRecipe", "PruneRecipe", "Recipe"),
    "runs.options": ("Options",),
    "runs.results": ("Pruned", "Trained"),
    "runs.run": ("Run",),
    "runs.single": ("finetune", "prune"),
    "runs.sweeping": ("Sweep", "sweep"),
}
"""Modules, and the public names that they define."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
