"""Cutting heads whose gates have long settled shut, while training goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from deadhead.cutting import trim
from deadhead.errors import CutError, InputError
from deadhead.files import write_json
from deadhead.gates import HeadGates
from deadhead.gating import gates_of, unwrapped
from deadhead.plan import HeadPlan

# Share of the draws in which a gate that counts as shut opens, at most; hard gates do at log_alpha −4.
_AJAR = 0.018
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
        self.gives_up = False
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
        if self.gives_up:
            return
        kept: dict[Any, list[int]] = {}
        present = self.gates.present
        for layer, gate in self.gates:
            last, values = self.last_ajar[str(layer)], gate.log_alpha.tolist()
            is_ajar = gate.is_open | (gate.open_probability >= _AJAR)
            for place in is_ajar.nonzero().flatten().tolist():
                last[place] = state.global_step
            places = [place for place in gate.kept.tolist() if state.global_step - last[place] < self.steps]
            # The head that is likeliest to be open stays, if none is left.
            places = places or [max(gate.kept.tolist(), key=values.__getitem__)]
            kept[layer] = [self.gates.heads[layer][place] for place in places]
        if any(len(heads) < len(present[layer]) for layer, heads in kept.items()):
            # Accelerate wraps the optimizer.
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            try:
                trim(kwargs["model"], self.gates.plan_of({**present, **kept}), optimizer)
            except CutError as error:
                # Training is worth more than the time it would have saved.
                warnings.warn(f"Heads stay until the end of the training: {error}", stacklevel=2)
                self.gives_up = True


def save_trimmed(model: nn.Module, checkpoint: Path) -> None:
    """Note in a checkpoint's folder which heads its weights are of, if training has cut some."""
    gates = gates_of(unwrapped(model))
    if gates is not None and not all(gate.is_whole for _, gate in gates):
        write_json(checkpoint / _PLAN_FILE, gates.plan_of(gates.present).to_dict())


def restore_trimmed(model: PreTrainedModel, gates: HeadGates, checkpoint: Path) -> None:
    """Cut a model to the heads that a checkpoint's weights are of, before these are loaded.

    Raises:
        InputError: training has cut other heads of this model already, which do not come back.
    """
    path = checkpoint / _PLAN_FILE
    if not path.exists() and all(gate.is_whole for _, gate in gates):
        return
    plan = HeadPlan.from_json(path) if path.exists() else gates.plan_of(gates.heads)
    if any(not set(heads) <= set(gates.present[layer]) for layer, heads in plan.units.items()):
        raise InputError(
            f"The checkpoint {checkpoint} has heads that training has cut off this model since; load the model anew to "
            "go on from it."
        )
    # The gates' own values come with the weights; closed ones let the cut check itself.
    gates.set_plan(plan)
    trim(model, plan)
