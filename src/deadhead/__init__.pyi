"""The public API, and where its names are defined."""

from .checkpoint import load, load_gated, save
from .cost import Cost, model_cost
from .criteria import score_heads
from .cutting import cut
from .data import load_text
from .errors import CutError, DivergenceError, ExportError, InputError, RunWarning, UnsupportedModel
from .evaluation import Evaluation, evaluate
from .export.exporting import Exported, export_model
from .gate_files import load_gates, save_gates
from .gates import HeadGates
from .gating import attach, detach, gates_of
from .hard_concrete import GateConfig
from .models import AllAttentionConfig, AllAttentionForCausalLM
from .plan import BlockPlan, HeadPlan
from .ranking import HeadScores
from .report.writing import Report, report_run
from .streaming.cutting import CheckpointCut, cut_checkpoint
from .timing import bench
from .training import (
    PhaseRecipe,
    PruneRecipe,
    SparsityCallback,
    attach_gates,
    close_to_budget,
    gate_config,
    rank,
    train,
)

__version__: str

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
