"""Skip the units that are closed in a draw, while only gates learn.

If no weight of a module learns, the outputs of closed units are not needed: their z is 0, and so is its gradient. For
one forward pass the module is shrunk to the open units, as a cut would do, and then put back. Except for rounding it
computes the same as with all units. Deadhead's own attention skips closed heads itself, also while weights learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deadhead.gates.head_gate import HeadGate
from deadhead.gates.sharding import is_sharded
from deadhead.layouts import Site
from deadhead.layouts.temporary import shrink_for_now

# The share of a module's units that must be closed: gathering the weights that are left takes time too.
_LEAST = 1 / 8


class Skipping:
    """Shrinks one site's module before it runs and puts it back afterwards.

    It is an object rather than a closure, so that a deep copy of the model refers to the copy's modules.
    """

    def __init__(self, site: Site, gate: HeadGate) -> None:
        self.site, self.gate = site, gate
        # Which of the site's units are computed now, (U,), by their place; None: all of them.
        self.computed: Tensor | None = None
        self._put_back: Callable[[], None] | None = None

    def hang(self) -> None:
        """Register the hooks on the module."""
        self.site.module.register_forward_pre_hook(_Shrink(self))
        # Also where gradient checkpointing leaves a module in the middle.
        self.site.module.register_forward_hook(_PutBack(self), always_call=True)

    def shrink(self, module: nn.Module) -> None:
        """Leave out the units that are closed in this draw, if there are enough of them and no weight learns."""
        if torch.compiler.is_compiling() or module is not self.site.module or not (idle := self.gate.idle):
            return
        owners = range(len(self.site.units)) if self.gate.owner is None else self.gate.owner.tolist()
        shut = set(idle)
        # A module without units would have to be told what it returns; one gate's, times 0, cost little.
        open_gates = {gate for gate in range(self.gate.num_heads) if gate not in shut} or {0}
        places = [place for place, gate in enumerate(owners) if gate in open_gates]
        if len(places) > (1 - _LEAST) * len(self.site.units) or not self._is_frozen(module):
            return
        self._put_back = shrink_for_now(self.site, tuple(self.site.units[place] for place in places))
        self.computed = torch.tensor(places, dtype=torch.long)

    def put_back(self) -> None:
        """Give the module all its units again."""
        if self._put_back is not None:
            self._put_back()
        self._put_back = self.computed = None

    def _is_frozen(self, module: nn.Module) -> bool:
        """Return whether the weights are whole and plain, and none of them learns."""
        gates = {id(each.log_alpha_bias) for each in module.modules() if isinstance(each, HeadGate)}
        named = {name: p for name, p in module.named_parameters() if id(p) not in gates}
        learns = any(parameter.requires_grad or is_sharded(parameter) for parameter in named.values())
        return not learns and all(part.path in named for part in self.site.selections(self.site.units[:1]))


class _Hook:
    def __init__(self, skipping: Skipping) -> None:
        self.skipping = skipping

    @property
    def gate(self) -> HeadGate:
        return self.skipping.gate


class _Shrink(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.skipping.shrink(module)


class _PutBack(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self.skipping.site.module:
            self.skipping.put_back()


SKIPPING_HOOKS = (_Shrink, _PutBack)
