"""Batches of a text shared among processes, whose sums are added up; this module has the case of one process.

`deadhead.training.processes.together` is for several processes that read a text together.

Dimensions: R rows of this process, P rows of all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class Shares:
    """One process's share of the work of several; a single process does everything.

    All processes call the same methods in the same order, except for `is_own`.
    """

    count = 1
    """Among how many processes batches are shared out."""
    index = 0

    def dealing(self) -> Dealing:
        """Return an object that says, batch by batch, which batches are this process's own."""
        return Dealing(self.count, self.index)

    def total(self, *sums: Tensor) -> None:
        """Add the other processes' tensors to these in place; all processes then have the same numbers, bit for bit."""

    def of_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` in the main process only, and return its result in all; it must hold no tensors on a GPU."""
        return work()

    def agreed(self, value: _T) -> _T:
        """Return the main process's value in all processes."""
        return self.of_main(lambda: value)

    def undivided(self) -> Shares:
        """Return shares in which every process does everything, and only `of_main` returns the main one's result."""
        return self

    def any(self, value: bool) -> bool:
        """Return whether a value is true in any process."""
        found = torch.tensor(float(value))
        self.total(found)
        return self.agreed(bool(found))

    def joined(self, rows: Tensor) -> Tensor:
        """Return the rows (R, …) of all processes as (P, …), those of the main process first."""
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
    """Assigns batches one by one, each to the process with the least work so far, so that all have about the same."""

    def __init__(self, count: int, index: int) -> None:
        self._sizes, self._index = [0] * count, index

    def is_own(self, size: int) -> bool:
        """Return whether the next batch, with this number of tokens, is this process's own."""
        least = self._sizes.index(min(self._sizes))
        self._sizes[least] += size
        return least == self._index


ALONE = Shares()
