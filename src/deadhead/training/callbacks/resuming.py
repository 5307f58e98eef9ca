"""Whether the weights that a Trainer resumes from have gates, as the model has."""

from __future__ import annotations

from typing import Any

from torch import nn

from deadhead.attaching import is_gate
from deadhead.errors import InputError


class SameGates:
    """Refuses weights with gates for a model without, and all of a model's weights without its gates.

    A Trainer loads weights, then the state of its optimizer, and only then calls its callbacks; torch refuses a state
    that was made without the gates, or with them, and names neither. Weights come in parts where a checkpoint is
    in shards; adapters come without gates in any case.
    """

    def __init__(self, model: nn.Module) -> None:
        self._came: set[str] = set()
        self._hook = model.register_load_state_dict_post_hook(self._check)

    def remove(self) -> None:
        """Let the model take any weights again."""
        self._hook.remove()

    def _check(self, model: nn.Module, keys: Any) -> None:
        """Raise if the keys that were `missing_keys` and `unexpected_keys` of a load say that gates do not fit."""
        names = dict(model.named_parameters(remove_duplicate=False))
        has_gates = any(map(is_gate, names))
        if not has_gates and any(map(is_gate, keys.unexpected_keys)):
            raise InputError(
                "The weights to load have gates, but the Trainer's model has none; before you resume, attach gates "
                "with deadhead.attach as they were attached when the checkpoint was written."
            )
        self._came |= names.keys() - set(keys.missing_keys)
        # A tied weight has several names, and comes by one.
        came = {names[name] for name in self._came & names.keys()}
        if has_gates and came == {parameter for name, parameter in names.items() if not is_gate(name)}:
            raise InputError(
                "The weights to load have no gates, but the Trainer's model has; a checkpoint that was written without "
                "gates cannot be resumed with them: load its weights and attach gates before the Trainer is made, and "
                "start a new training."
            )
