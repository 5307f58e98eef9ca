"""What a phase's recipe leaves to the model, filled in."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedModel

from deadhead.layouts import find_layout
from deadhead.models import OWN_TYPES, AllAttentionConfig
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe

# log_alpha's learning rate where the model's own is too small for gates to close in a short phase.
_GATE_RATE = 0.02

_P = TypeVar("_P", bound=PhaseRecipe)


def with_defaults(phase: _P, model: PreTrainedModel) -> _P:
    """Return a phase's recipe with what it leaves to the model filled in.

    Deadhead's own models are trained from scratch, with the paper's output scale. Others come pretrained: the weights
    take small steps, the gates do not for that, and what is left of a layer is not scaled up.
    """
    ours = model.config.model_type in OWN_TYPES
    rate = phase.learning_rate or (2e-3 if ours else 5e-5)
    filled: dict[str, Any] = {"learning_rate": rate}
    if isinstance(phase, PruneRecipe):
        # With an optimizer of their own the scale would only make clipping see more of the gates' gradients.
        scale = 1.0 if phase.gate_lr != 0 else 10.0 if ours else _GATE_RATE / rate
        filled["gate_lr_scale"] = phase.gate_lr_scale or scale
        filled["output_scale"] = ours if phase.output_scale is None else phase.output_scale
        filled["blocks"] = _has_blocks(phase, model)
    return phase.model_copy(update=filled)


def _has_blocks(phase: PruneRecipe, model: PreTrainedModel) -> bool:
    """Tell whether blocks have gates: as the recipe says, else where heads alone would leave most of the cost."""
    if phase.blocks is not None or phase.block_size is not None:
        return phase.blocks is not False
    asked = phase.budget is not None and phase.budget.kind in ("params", "flops", "speedup")
    return (
        asked
        and model.config.model_type != AllAttentionConfig.model_type
        and bool(find_layout(model).block_sites(model))
    )
