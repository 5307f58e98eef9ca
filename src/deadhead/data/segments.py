"""One long text in rows: rows of segments, in which each batch continues the one before it, or independent rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from deadhead.errors import InputError, typed


def require_ids(tokens: np.ndarray) -> None:
    """Check that an array holds a sequence of tokens.

    Raises:
        InputError: the array is not one-dimensional, or does not hold whole numbers.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(
            f"Tokens were expected as a one-dimensional array of whole numbers, but got an array of {tokens.dtype} "
            f"with the shape {tokens.shape}."
        )


class SegmentDataset(Dataset[dict[str, torch.Tensor]]):
    """Cuts a flat stream into contiguous rows of equal length, and each row into consecutive segments.

    Item i is segment i // rows of row i % rows. If W processes take batches of B items in turn and rows = B · W, each
    row of a batch continues the same row of the process's previous batch, whose hidden states are its memory.

    Args:
        tokens: (n,), ids. Tokens after the last whole segment of all rows are dropped.
        rows: number of rows in a batch over all processes.
        segment_length: T, tokens that a model sees at once.
        first_segment: the segment of every row to start with, in a later phase; after the last segment, reading
            continues at the first.

    Raises:
        InputError: the text is shorter than one segment per row, or a number is not positive.
    """

    @typed
    def __init__(self, tokens: np.ndarray, *, rows: int, segment_length: int, first_segment: int = 0) -> None:
        require_ids(tokens)
        if rows < 1 or segment_length < 1:
            raise InputError(
                "At least 1 row and a segment_length of at least 1 were expected, "
                f"but got {rows} rows and a segment_length of {segment_length}."
            )
        needed = rows * segment_length + 1  # each token has a next one for its label
        if len(tokens) < needed:
            raise InputError(
                f"At least {needed} tokens were expected for {rows} rows of segments of {segment_length}, but the text "
                f"has {len(tokens)}; shorten segment_length or the batch size, or use more text."
            )
        self._tokens = tokens
        self._rows = rows
        self._segment_length = segment_length
        self._segments_per_row = (len(tokens) - 1) // (rows * segment_length)
        self._first_segment = first_segment

    def __len__(self) -> int:
        return self._rows * self._segments_per_row

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a segment: `input_ids` (T,), `labels` (T,), the next tokens, and `is_first` (), bool: begins its row.

        Raises:
            IndexError: there is no such segment.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        position, row = divmod(index, self._rows)
        segment = (position + self._first_segment) % self._segments_per_row
        start = (row * self._segments_per_row + segment) * self._segment_length
        # One conversion of T + 1 ids; input_ids and labels are views of it.
        ids = torch.from_numpy(self._tokens[start : start + self._segment_length + 1].astype(np.int64))
        return {"input_ids": ids[:-1], "labels": ids[1:], "is_first": torch.tensor(segment == 0)}


class RowDataset(Dataset[dict[str, torch.Tensor]]):
    """Cuts a flat stream into rows for a model without memory, each of which begins as a tokenizer begins a text.

    Args:
        tokens: (n,), ids. Tokens after the last whole row are dropped.
        length: T, tokens that a model sees at once: those of the prefix, and the next ones of the stream.
        prefix: the tokens that every row begins with.
        scored: (n,), whether a token counts; None: all count. Rows in which no token counts are left out.

    Raises:
        InputError: the text is shorter than a row, the prefix leaves no room in a row, or no token counts.
    """

    @typed
    def __init__(
        self, tokens: np.ndarray, *, length: int, prefix: tuple[int, ...] = (), scored: np.ndarray | None = None
    ) -> None:
        require_ids(tokens)
        if scored is not None and (scored.dtype != np.bool_ or scored.shape != tokens.shape):
            raise InputError(
                f"scored must hold a bool for each of the {len(tokens)} tokens, but got an array of {scored.dtype} "
                f"with the shape {scored.shape}."
            )
        if len(prefix) >= length:
            raise InputError(
                f"Rows longer than the {len(prefix)} tokens that the tokenizer puts before a text were expected, but "
                f"got a sequence_length (--sequence-length) of {length}; choose a longer one."
            )
        if len(tokens) <= length - len(prefix):
            raise InputError(
                f"More than {length - len(prefix)} tokens of text were expected for a row of {length}, but the text "
                f"has {len(tokens)}; choose a shorter sequence_length (--sequence-length), or use more text."
            )
        self._segments = SegmentDataset(tokens, rows=1, segment_length=length - len(prefix))
        self._prefix = torch.tensor(prefix, dtype=torch.int64)
        self._scored_RT: np.ndarray | None = None
        self._rows: Sequence[int] = range(len(self._segments))
        if scored is not None:
            width = length - len(prefix)
            self._scored_RT = scored[: len(self._rows) * width].reshape(-1, width)
            # A row's first token has nothing before it that it could be told from, without a prefix.
            self._rows = np.flatnonzero(self._scored_RT[:, 0 if prefix else 1 :].any(axis=1)).tolist()
            if not self._rows:
                raise InputError(
                    "answers_only expects answers in the text, but it has none; use more conversations, or leave "
                    "answers_only out."
                )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a row: `input_ids` (T,), `scored` (T,), bool: is of the text and counts, and `is_first` (): True.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self._rows[index]
        ids = self._segments[row]["input_ids"]
        whole = torch.cat([self._prefix, ids])
        scored = torch.arange(len(whole)) >= len(self._prefix)
        if self._scored_RT is not None:
            scored[len(self._prefix) :] = torch.from_numpy(self._scored_RT[row].copy())
        return {"input_ids": whole, "scored": scored, "is_first": torch.tensor(True)}
