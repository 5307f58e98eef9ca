"""deadhead finds the dead heads of a Transformer language model and cuts them off.

    gates = deadhead.attach(model)          # a trainable gate on every attention head
    ...                                     # train with deadhead.SparsityCallback(gates)
    deadhead.cut(model, gates.plan())       # heads whose gates closed are gone

The public API is `__all__`; everything else may change. A name is loaded when it is first used, and the Auto classes of
transformers learn of deadhead's models when transformers is imported.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deadhead.attaching import attach, detach, gates_of
    from deadhead.checkpoints.checkpoint import load, load_gated, save
    from deadhead.checkpoints.gate_files import load_gates, save_gates
    from deadhead.cutting import cut
    from deadhead.data import load_text
    from deadhead.errors import CutError, DivergenceError, ExportError, InputError, RunWarning, UnsupportedModel
    from deadhead.export.exporting import Exported, export_model
    from deadhead.gates.gates import HeadGates
    from deadhead.gates.hard_concrete import GateConfig
    from deadhead.measure.cost import model_cost
    from deadhead.measure.costs import Cost
    from deadhead.measure.criteria import score_heads
    from deadhead.measure.evaluation import Evaluation, evaluate
    from deadhead.measure.timing import bench
    from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM
    from deadhead.plans.plan import BlockPlan, HeadPlan
    from deadhead.plans.scores import HeadScores
    from deadhead.report.writing import Report, report_run
    from deadhead.streaming.cutting import CheckpointCut, cut_checkpoint
    from deadhead.training.callbacks.sparsity import SparsityCallback
    from deadhead.training.phases.choosing import attach_gates, close_to_budget, gate_config
    from deadhead.training.phases.phase import rank, train
    from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe

__version__ = "0.1.0"

_HOME = {
    "AllAttentionConfig": "models",
    "AllAttentionForCausalLM": "models",
    "BlockPlan": "plans.plan",
    "CheckpointCut": "streaming.cutting",
    "Cost": "measure.costs",
    "CutError": "errors",
    "DivergenceError": "errors",
    "Evaluation": "measure.evaluation",
    "ExportError": "errors",
    "Exported": "export.exporting",
    "GateConfig": "gates.hard_concrete",
    "HeadGates": "gates.gates",
    "HeadPlan": "plans.plan",
    "HeadScores": "plans.scores",
    "InputError": "errors",
    "PhaseRecipe": "training.recipes.recipe",
    "PruneRecipe": "training.recipes.recipe",
    "Report": "report.writing",
    "RunWarning": "errors",
    "SparsityCallback": "training.callbacks.sparsity",
    "UnsupportedModel": "errors",
    "attach": "attaching",
    "attach_gates": "training.phases.choosing",
    "bench": "measure.timing",
    "close_to_budget": "training.phases.choosing",
    "cut": "cutting",
    "cut_checkpoint": "streaming.cutting",
    "detach": "attaching",
    "evaluate": "measure.evaluation",
    "export_model": "export.exporting",
    "gate_config": "training.phases.choosing",
    "gates_of": "attaching",
    "load": "checkpoints.checkpoint",
    "load_gated": "checkpoints.checkpoint",
    "load_gates": "checkpoints.gate_files",
    "load_text": "data",
    "model_cost": "measure.cost",
    "rank": "training.phases.phase",
    "report_run": "report.writing",
    "save": "checkpoints.checkpoint",
    "save_gates": "checkpoints.gate_files",
    "score_heads": "measure.criteria",
    "train": "training.phases.phase",
}
"""Public names, and the modules that define them."""

__all__ = [
    "AllAttentionConfig",
    "AllAttentionForCausalLM",
    "BlockPlan",
    "CheckpointCut",
    "Cost",
    "CutError",
    "DivergenceError",
    "Evaluation",
    "ExportError",
    "Exported",
    "GateConfig",
    "HeadGates",
    "HeadPlan",
    "HeadScores",
    "InputError",
    "PhaseRecipe",
    "PruneRecipe",
    "Report",
    "RunWarning",
    "SparsityCallback",
    "UnsupportedModel",
    "attach",
    "attach_gates",
    "bench",
    "close_to_budget",
    "cut",
    "cut_checkpoint",
    "detach",
    "evaluate",
    "export_model",
    "gate_config",
    "gates_of",
    "load",
    "load_gated",
    "load_gates",
    "load_text",
    "model_cost",
    "rank",
    "report_run",
    "save",
    "save_gates",
    "score_heads",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Registration(MetaPathFinder):
    """Lets the Auto classes know deadhead's models as soon as transformers is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Return the module's spec as the other finders know it, with our models imported behind it."""
        if fullname != "transformers":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module
            loader.exec_module = lambda module: (execute(module), import_module("deadhead.models"))
        return spec


if "transformers" in sys.modules:
    import_module("deadhead.models")
else:
    sys.meta_path.insert(0, _Registration())
