"""Pieces of a batch that are attended at a time, so that their scores stay in the processor's cache.

Imports torch only. Dimensions: B batch, T queries, S context positions, W window (memory + 1); of a block n texts,
t queries and c = W + t − 1 columns, those of the context that one of its queries sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# Queries of a block, at least, where a long text is read through a short window.
_MIN_QUERIES = 64


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some texts, some queries of each, and the positions of the context that they see."""

    texts: slice
    queries: slice
    context: slice
    columns: int

    @property
    def num_texts(self) -> int:
        """n."""
        return int(self.texts.stop - self.texts.start)

    @property
    def num_queries(self) -> int:
        """t."""
        return int(self.queries.stop - self.queries.start)

    @property
    def num_missing(self) -> int:
        """Columns that stand before the first position of the context."""
        return self.columns - int(self.context.stop - self.context.start)


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """How a batch is cut into blocks.

    Args:
        batch: B.
        queries: T, which stand at the last positions of the context.
        context: S.
        window: W.
        others: scores of a query that are not of the context.
        capacity: scores a block may have at most, as far as one text allows.
    """

    batch: int
    queries: int
    context: int
    window: int
    others: int
    capacity: int

    @property
    def step(self) -> int:
        """Queries of a block. More than a window of them would see columns that are far from their own."""
        return min(self.queries, max(self.window, _MIN_QUERIES))

    @property
    def texts(self) -> int:
        """Texts of a block."""
        return max(1, min(self.batch, self.capacity // (self.step * self._row)))

    @property
    def _row(self) -> int:
        return self.window + self.step - 1 + self.others

    @property
    def size(self) -> int:
        """Scores of the largest block."""
        return self.texts * self.step * self._row

    def __iter__(self) -> Iterator[Block]:
        for query in range(0, self.queries, self.step):
            end = min(query + self.step, self.queries)
            columns = self.window + end - query - 1
            last = self.context - self.queries + end
            for text in range(0, self.batch, self.texts):
                yield Block(
                    texts=slice(text, min(text + self.texts, self.batch)),
                    queries=slice(query, end),
                    context=slice(max(0, last - columns), last),
                    columns=columns,
                )


def by_distance(scores_tc: Tensor, window: int) -> Tensor:
    """View the scores (…, t, c) of a block by distance, (…, t, W), oldest first: row i begins i columns later."""
    *outer, row, column = scores_tc.stride()
    return scores_tc.as_strided((*scores_tc.shape[:-1], window), (*outer, row + column, column))
