"""Cutting heads whose gates have long settled shut, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from deadhead.cutting import trim
from deadhead.files import write_json
from deadhead.gates import HeadGates
from deadhead.gating import gates_of, unwrapped
from deadhead.plan import HeadPlan, Layer

# log_alpha below which a gate counts as shut: it then opens in fewer than 1.8 % of the draws.
_SHUT = -4.0
_PLAN_FILE = "trimmed_plan.json"


class SettledHeads(TrainerCallback, ExportableState):
    """Cuts a head for good once its gate has been shut for long, so that the rest of the training is faster.

    An approximation: such a gate would have opened now and then, and could have come back. The last head of a layer
    stays until the end of the training.

    Args:
        gates: what is being trained.
        steps: how many steps in a row a gate must have been shut.
    """

    def __init__(self, gates: HeadGates, steps: int) -> None:
        self.gates = gates
        self.steps = steps
        # By layer, the last step at which each gate was not shut.
        self.last_ajar = {str(layer): [0] * gate.num_heads for layer, gate in gates}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"args": {}, "attributes": {"last_ajar": self.last_ajar}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where a checkpoint left off."""
        # A dictionary when it was read from a checkpoint; declared as the list it is made of.
        saved = cast(dict[str, Any], state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and saved:
            self.last_ajar = saved["attributes"]["last_ajar"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Cut what has settled."""
        kept: dict[Any, list[int]] = {}
        present = self.gates.present
        for layer, gate in self.gates:
            last, values = self.last_ajar[str(layer)], gate.log_alpha.tolist()
            for place, value in enumerate(values):
                if value >= _SHUT:
                    last[place] = state.global_step
            places = [place for place in gate.kept.tolist() if state.global_step - last[place] < self.steps]
            # The head that is likeliest to be open stays, if none is left.
            places = places or [max(gate.kept.tolist(), key=values.__getitem__)]
            kept[layer] = [self.gates.heads[layer][place] for place in places]
        if any(len(heads) < len(present[layer]) for layer, heads in kept.items()):
            # Accelerate wraps the optimizer.
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            trim(kwargs["model"], _plan(self.gates, {**present, **kept}), optimizer)


def save_trimmed(model: nn.Module, checkpoint: Path) -> None:
    """Note in a checkpoint's folder which heads its weights are of, if training has cut some."""
    gates = gates_of(unwrapped(model))
    if gates is not None and not all(gate.is_whole for _, gate in gates):
        write_json(checkpoint / _PLAN_FILE, _plan(gates, gates.present).to_dict())


def restore_trimmed(model: PreTrainedModel, gates: HeadGates, checkpoint: Path) -> None:
    """Cut a model with all its heads to those that a checkpoint's weights are of, before these are loaded."""
    if (checkpoint / _PLAN_FILE).exists():
        plan = HeadPlan.from_json(checkpoint / _PLAN_FILE)
        # The gates' own values come with the weights; closed ones let the cut check itself.
        gates.set_plan(plan)
        trim(model, plan)


def _plan(gates: HeadGates, kept: Mapping[Layer, Sequence[int]]) -> HeadPlan:
    return HeadPlan(kept=kept, total=gates.total, unit=gates.unit, output_scale=gates.config.output_scale)
