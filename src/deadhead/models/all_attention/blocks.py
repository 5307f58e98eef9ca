"""Pieces of a batch that are attended at a time, so that their scores stay in the processor's cache.

Dimensions: B batch, T queries, S context positions, W window (memory + 1), H heads; of a block
h heads, n texts, t queries and c = W + t − 1 columns, those of the context that one of its queries sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# Queries of a block, at least, where a long text is read through a short window.
_MIN_QUERIES = 64


@dataclass(frozen=True)
class Block:
    """Some heads, some texts, some queries of each, and the positions of the context that they see."""

    heads: slice
    texts: slice
    queries: slice
    context: slice
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, n, t)."""
        return (_length(self.heads), _length(self.texts), _length(self.queries))

    @property
    def num_missing(self) -> int:
        """Columns that stand before the first position of the context."""
        return self.columns - _length(self.context)

    @property
    def is_first(self) -> bool:
        """Whether it is the first block of its heads."""
        return bool(self.texts.start == self.queries.start == 0)


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """How a batch is cut into blocks: all texts of several heads, or some texts of one."""

    heads: int
    batch: int
    queries: int  # at the last positions of the context
    context: int
    window: int
    others: int = 0  # scores of a query that are not of the context
    capacity: int  # scores a block may have at most, as far as 64 queries of one text and head allow

    @property
    def num_queries(self) -> int:
        """Queries of a block.

        More than a window of them would see columns that are far from their own. One text and head has
        t (W + t − 1 + others) scores, which should fit.
        """
        others = self.window - 1 + self.others
        fitting = (math.isqrt(others**2 + 4 * self.capacity) - others) // 2
        return min(self.queries, max(min(self.window, fitting), _MIN_QUERIES))

    @property
    def num_texts(self) -> int:
        """Texts of a block."""
        return max(1, min(self.batch, self.capacity // self._one))

    @property
    def num_heads(self) -> int:
        """Heads of a block."""
        return max(1, min(self.heads, self.capacity // (self._one * self.batch)))

    @property
    def _one(self) -> int:
        return self.num_queries * (self.window + self.num_queries - 1 + self.others)

    @property
    def size(self) -> int:
        """Scores of the largest block."""
        return self.num_heads * self.num_texts * self._one

    def __iter__(self) -> Iterator[Block]:
        for queries in _slices(self.queries, self.num_queries):
            last = self.context - self.queries + queries.stop
            columns = self.window + _length(queries) - 1
            for heads in _slices(self.heads, self.num_heads):
                for texts in _slices(self.batch, self.num_texts):
                    yield Block(heads, texts, queries, slice(max(0, last - columns), last), columns)


def by_distance(scores_tc: Tensor, window: int) -> Tensor:
    """View the scores (…, t, c) of a block by distance, (…, t, W), oldest first: row i begins i columns later."""
    *outer, row, column = scores_tc.stride()
    return scores_tc.as_strided((*scores_tc.shape[:-1], window), (*outer, row + column, column))


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _length(part: slice) -> int:
    return int(part.stop - part.start)
