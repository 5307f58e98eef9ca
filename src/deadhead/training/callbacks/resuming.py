"""A check that the weights a Trainer resumes from have gates if, and only if, its model has."""

from __future__ import annotations

from typing import Any

from torch import nn

from deadhead.attaching import is_gate
from deadhead.errors import InputError


class SameGates:
    """Refuses weights with gates for a model without gates, and complete weights without gates for a model with gates.

    A Trainer loads weights, then the state of its optimizer, and only then calls its callbacks. If that state was made
    with other gates, torch refuses it without naming the gates. Weights are loaded in parts if a checkpoint is in
    shards; adapters never contain gates.
    """

    def __init__(self, model: nn.Module) -> None:
        self._came: set[str] = set()
        self._hook = model.register_load_state_dict_post_hook(self._check)

    def remove(self) -> None:
        """Remove the check from the model."""
        self._hook.remove()

    def _check(self, model: nn.Module, keys: Any) -> None:
        """Raise InputError if the `missing_keys` and `unexpected_keys` of a load show that gates do not fit."""
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
