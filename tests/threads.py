"""Threads that share a text out as processes do: sums over any number of them are added up in one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

from torch import Tensor

from deadhead.data.shares import ALONE, Shares

_T = TypeVar("_T")


class _Thread(Shares):
    def __init__(self, index: int, barrier: Barrier, given: list[Any]) -> None:
        self.index, self.count = index, len(given)
        self._barrier, self._given = barrier, given

    def total(self, *sums: Tensor) -> None:
        for values in sums:
            everyones = self._exchanged(values.clone())
            values.zero_()
            for each in everyones:
                values += each

    def of_main(self, work: Callable[[], _T]) -> _T:
        found: _T = self._exchanged(work() if self.index == 0 else None)[0]
        return found

    def undivided(self) -> Shares:
        return ALONE

    def _exchanged(self, value: Any) -> list[Any]:
        self._given[self.index] = value
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


def shared_by(count: int, work: Callable[[Shares], _T]) -> list[_T]:
    """Return what each of several threads makes of its share; all end if one fails."""
    barrier, given = Barrier(count), [None] * count

    def one(index: int) -> _T:
        try:
            return work(_Thread(index, barrier, given))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
