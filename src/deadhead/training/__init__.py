"""Training on transformers' Trainer: recipes, phases, the sparsity callback, whole runs, and a phase in one call.

A name is loaded when it is first used: recipes and the command line's help need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deadhead.training.callbacks.sparsity import SparsityCallback as SparsityCallback
    from deadhead.training.phases.choosing import attach_gates as attach_gates
    from deadhead.training.phases.choosing import close_to_budget as close_to_budget
    from deadhead.training.phases.choosing import gate_config as gate_config
    from deadhead.training.phases.one_shot import rank as rank
    from deadhead.training.phases.phase import PhaseRun as PhaseRun
    from deadhead.training.phases.phase import train as train
    from deadhead.training.recipes.reading import load_recipe as load_recipe
    from deadhead.training.recipes.recipe import DataRecipe as DataRecipe
    from deadhead.training.recipes.recipe import ModelRecipe as ModelRecipe
    from deadhead.training.recipes.recipe import PhaseRecipe as PhaseRecipe
    from deadhead.training.recipes.recipe import PruneRecipe as PruneRecipe
    from deadhead.training.recipes.recipe import Recipe as Recipe
    from deadhead.training.runs.one_call import finetune as finetune
    from deadhead.training.runs.one_call import prune as prune
    from deadhead.training.runs.results import Pruned as Pruned
    from deadhead.training.runs.results import Trained as Trained
    from deadhead.training.runs.run import Run as Run
    from deadhead.training.runs.single import Options as Options

_HOME = {
    "DataRecipe": "recipes.recipe",
    "ModelRecipe": "recipes.recipe",
    "Options": "runs.single",
    "PhaseRecipe": "recipes.recipe",
    "PhaseRun": "phases.phase",
    "PruneRecipe": "recipes.recipe",
    "Pruned": "runs.results",
    "Recipe": "recipes.recipe",
    "Run": "runs.run",
    "SparsityCallback": "callbacks.sparsity",
    "Trained": "runs.results",
    "attach_gates": "phases.choosing",
    "close_to_budget": "phases.choosing",
    "finetune": "runs.one_call",
    "gate_config": "phases.choosing",
    "load_recipe": "recipes.reading",
    "prune": "runs.one_call",
    "rank": "phases.one_shot",
    "train": "phases.phase",
}
"""Public names, and the modules that define them."""

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value
