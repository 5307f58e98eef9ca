"""The cost of a model (parameters, FLOPs, bytes or seconds) as a function of the units that each layer keeps.

The cost depends only on how many of a layer's units stay, not on which.

Dimensions: K keys (a layer's heads, or its hidden units), N most units of a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deadhead.plans.plan import UnitKey


@dataclass(frozen=True, kw_only=True)
class UnitCosts:
    """A cost that is a sum over layers; the cost of each layer is a function of its number of units."""

    fixed: float  # what is left when all units are gone
    # By key, the cost of 0, 1, … all of its units together, (units + 1,), float64 on the CPU, beginning with 0.
    tables: Mapping[UnitKey, Tensor]

    @cached_property
    def total(self) -> float:
        """The cost of the model as it is."""
        return self.fixed + sum(float(table[-1]) for table in self.tables.values())

    def of(self, counts: Mapping[UnitKey, float]) -> float:
        """Return the cost for the given number of units by key; between whole numbers it is interpolated."""
        return self.of_counts(torch.tensor([float(counts[key]) for key in self.tables], dtype=torch.float64))

    def of_counts(self, counts_K: Tensor) -> float:
        """Return the cost for the given numbers of units, (K,), in the order of the tables."""
        if not self.tables:
            return self.fixed
        last_K = torch.tensor([len(table) - 1 for table in self.tables.values()])
        bounded_K = torch.minimum(counts_K.double().clamp(min=0), last_K.double())
        low_K = torch.minimum(bounded_K.floor().long(), (last_K - 1).clamp(min=0))
        share_K = bounded_K - low_K
        padded_KN = self._padded
        below_K = padded_KN.gather(1, low_K[:, None])[:, 0]
        above_K = padded_KN.gather(1, low_K[:, None] + 1)[:, 0]
        return self.fixed + float((below_K + share_K * (above_K - below_K)).sum())

    def slopes(self, counts: Mapping[UnitKey, float]) -> dict[UnitKey, float]:
        """Return, by key, the cost of one unit more or less at these counts: the slope through the neighbours."""
        found: dict[UnitKey, float] = {}
        for key, table in self.tables.items():
            low, high = max(0, round(counts[key]) - 1), min(len(table) - 1, round(counts[key]) + 1)
            found[key] = float(table[high] - table[low]) / max(1, high - low)
        return found

    def saved(self, key: UnitKey, count: int, units: int = 1) -> float:
        """Return the cost that is saved when some of `count` units of a key go."""
        table = self._numbers[key]
        return table[count] - table[count - units]

    @cached_property
    def _numbers(self) -> dict[UnitKey, list[float]]:
        # Reading a tensor's entry takes a hundred times as long, and rankings read one for each hidden unit.
        return {key: table.double().tolist() for key, table in self.tables.items()}

    @cached_property
    def _padded(self) -> Tensor:
        # Every table has two entries at least: a key has one unit or more.
        return torch.nn.utils.rnn.pad_sequence([table.double() for table in self.tables.values()], batch_first=True)
