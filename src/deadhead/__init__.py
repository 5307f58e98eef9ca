"""deadhead finds the dead heads of a Transformer language model and cuts them off.

    pruned = deadhead.prune("NAME_OR_FOLDER", "my.txt", params=0.8)     # the whole of it in one call

    gates = deadhead.attach(model)          # or: a trainable gate on every attention head
    ...                                     # train with deadhead.SparsityCallback(gates)
    deadhead.cut(model, gates.plan())       # heads whose gates closed are gone

The public API is `__all__`, and what `deadhead.data`, `deadhead.training`, `deadhead.models` and the other folders name
as theirs. A name is loaded when it is first used, and the Auto classes of transformers learn of deadhead's models when
transformers is imported.
"""

import logging
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deadhead.attaching import attach as attach
    from deadhead.attaching import detach as detach
    from deadhead.attaching import gates_of as gates_of
    from deadhead.checkpoints.checkpoint import load as load
    from deadhead.checkpoints.checkpoint import load_gated as load_gated
    from deadhead.checkpoints.checkpoint import save as save
    from deadhead.compensation.compensating import compensate as compensate
    from deadhead.cutting import cut as cut
    from deadhead.errors import InputError as InputError
    from deadhead.errors import UnsupportedModel as UnsupportedModel
    from deadhead.export.exporting import export_model as export_model
    from deadhead.gates.gates import HeadGates as HeadGates
    from deadhead.gates.hard_concrete import GateConfig as GateConfig
    from deadhead.measure.cost import model_cost as model_cost
    from deadhead.measure.evaluation import evaluate as evaluate
    from deadhead.measure.timing import bench as bench
    from deadhead.plans.plan import HeadPlan as HeadPlan
    from deadhead.plans.unit_plan import UnitPlan as UnitPlan
    from deadhead.report.writing import report_run as report_run
    from deadhead.streaming.cutting import cut_checkpoint as cut_checkpoint
    from deadhead.training.callbacks.sparsity import SparsityCallback as SparsityCallback
    from deadhead.training.runs.single import finetune as finetune
    from deadhead.training.runs.single import prune as prune
    from deadhead.training.runs.streamed import prune_checkpoint as prune_checkpoint
    from deadhead.training.runs.sweeping import sweep as sweep

__version__ = "0.2.0"

# A library leaves it to programs whether and where its messages are shown.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_NAMES = {
    "attaching": ("attach", "detach", "gates_of"),
    "checkpoints.checkpoint": ("load", "load_gated", "save"),
    "compensation.compensating": ("compensate",),
    "cutting": ("cut",),
    "errors": ("InputError", "UnsupportedModel"),
    "export.exporting": ("export_model",),
    "gates.gates": ("HeadGates",),
    "gates.hard_concrete": ("GateConfig",),
    "measure.cost": ("model_cost",),
    "measure.evaluation": ("evaluate",),
    "measure.timing": ("bench",),
    "plans.plan": ("HeadPlan",),
    "plans.unit_plan": ("UnitPlan",),
    "report.writing": ("report_run",),
    "streaming.cutting": ("cut_checkpoint",),
    "training.callbacks.sparsity": ("SparsityCallback",),
    "training.runs.single": ("finetune", "prune"),
    "training.runs.streamed": ("prune_checkpoint",),
    "training.runs.sweeping": ("sweep",),
}
"""Modules, and the public names that they define."""

_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        # A folder of the package, such as deadhead.data.
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
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
