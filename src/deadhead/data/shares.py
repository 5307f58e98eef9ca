"""A text's batches shared out among processes, and what they sum up over their own added up: here for one alone.

Several processes that read a text together are `deadhead.training.processes.together`.

Dimensions: R rows of this process, P rows of all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class Shares:
    """The share of one process of what several do; of one alone, everything.

    All processes call the same methods in the same order, but for `is_own`.
    """

    count = 1
    """Among how many processes batches are shared out."""
    index = 0

    def dealing(self) -> Dealing:
        """Return what says, batch by batch, which are this process's own."""
        return Dealing(self.count, self.index)

    def total(self, *sums: Tensor) -> None:
        """Add to some tensors those of the other processes, in place: all then have the same numbers, to the bit."""

    def of_main(self, work: Callable[[], _T]) -> _T:
        """Return in all processes what `work` returns in the main one, which alone runs it; no tensors on a GPU."""
        return work()

    def agreed(self, value: _T) -> _T:
        """Return in all processes the value that the main one has."""
        return self.of_main(lambda: value)

    def undivided(self) -> Shares:
        """Return shares in which every process has everything, and only what `of_main` returns is the main one's."""
        return self

    def any(self, value: bool) -> bool:
        """Tell whether a value is true in some process."""
        found = torch.tensor(float(value))
        self.total(found)
        return self.agreed(bool(found))

    def joined(self, rows: Tensor) -> Tensor:
        """Return the rows (R, …) of all processes, (P, …), those of the main one first."""
        if self.count == 1:
            return rows
        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.index] = len(rows)
        self.total(lengths)
        ends = lengths.cumsum(0).tolist()
        # Each number is added to zeros, which leaves it as it is.
        found = rows.new_zeros(ends[-1], *rows.shape[1:])
        found[ends[self.index] - len(rows) : ends[self.index]] = rows
        self.total(found)
        return found


class Dealing:
    """Deals out batches one by one, each to the process that has least so far, so that all have about as much to do."""

    def __init__(self, count: int, index: int) -> None:
        self._sizes, self._index = [0] * count, index

    def is_own(self, size: int) -> bool:
        """Tell whether the next batch, of so many tokens, is this process's own."""
        least = self._sizes.index(min(self._sizes))
        self._sizes[least] += size
        return least == self._index


ALONE = Shares()
