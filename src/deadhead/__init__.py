"""deadhead finds the dead heads of a Transformer language model and cuts them off.

    gates = deadhead.attach(model)          # a trainable gate on every attention head
    ...                                     # train with deadhead.SparsityCallback(gates)
    deadhead.cut(model, gates.plan())       # heads whose gates closed are gone

What is exported here is the public API; everything else may change.
"""

from deadhead.bench import bench
from deadhead.checkpoint import load, load_gated, save
from deadhead.cost import Cost, model_cost
from deadhead.cut import cut
from deadhead.data import load_text
from deadhead.errors import CutError, DivergenceError, InputError, UnsupportedModel
from deadhead.evaluate import Evaluation, evaluate
from deadhead.gate_files import load_gates, save_gates
from deadhead.gates import GateConfig, HeadGates
from deadhead.gating import attach, detach, gates_of
from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM
from deadhead.plan import HeadPlan
from deadhead.training import PhaseRecipe, PruneRecipe, SparsityCallback, gate_config, train

__version__ = "0.1.0"

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
