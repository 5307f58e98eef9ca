"""The public API, and where its names are defined."""

from .checkpoint import load, load_gated, save
from .cost import Cost, model_cost
from .cutting import cut
from .data import load_text
from .errors import CutError, DivergenceError, InputError, UnsupportedModel
from .evaluation import Evaluation, evaluate
from .gate_files import load_gates, save_gates
from .gates import GateConfig, HeadGates
from .gating import attach, detach, gates_of
from .models import AllAttentionConfig, AllAttentionForCausalLM
from .plan import HeadPlan
from .timing import bench
from .training import PhaseRecipe, PruneRecipe, SparsityCallback, gate_config, train

__version__: str

__all__ = [
    "AllAttentionConfig",
    "AllAttentionForCausalLM",
    "Cost",
    "CutError",
    "DivergenceError",
    "Evaluation",
    "GateConfig",
    "HeadGates",
    "HeadPlan",
    "InputError",
    "PhaseRecipe",
    "PruneRecipe",
    "SparsityCallback",
    "UnsupportedModel",
    "attach",
    "bench",
    "cut",
    "detach",
    "evaluate",
    "gate_config",
    "gates_of",
    "load",
    "load_gated",
    "load_gates",
    "load_text",
    "model_cost",
    "save",
    "save_gates",
    "train",
]
