"""Copy one file of weights to another, with rows and columns of some tensors left out, in little memory.

Bytes are read in one thread, and hashed and written in another.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import cycle
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from deadhead.disk.stored import StoredTensor, read_exactly

# Bytes that are read at once, and how many such pieces may wait to be written.
CHUNK = 8 << 20
_WAITING = 3


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What is left of a tensor.

    Args:
        dim: the dimension along which rows go.
        index: (n,) the rows that stay, in their new order; one may stand several times.
        factor: (n,) what they are multiplied by, or None.
    """

    dim: int
    index: Tensor
    factor: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the new file: where it comes from, and what stays of it (None: all)."""

    source: StoredTensor
    keep: Keep | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its new shape."""
        shape, keep = self.source.shape, self.keep
        return shape if keep is None else (*shape[: keep.dim], len(keep.index), *shape[keep.dim + 1 :])

    @property
    def nbytes(self) -> int:
        """Its new size in bytes."""
        return prod(self.shape) * self.source.torch_dtype.itemsize


class Stopped(Exception):
    """The copy was asked to stop."""


def copy_pieces(
    source: Path,
    target: Path,
    pieces: Sequence[Piece],
    *,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> str:
    """Write a safetensors file of tensors of another; return the SHA-256 of what was written, in hexadecimal.

    `progress` is called with bytes of the source as they are done with; `stop` ends the copy when it is set.

    Raises:
        InputError: the source ended early.
        OSError: the device is full, say.
        Stopped: `stop` was set.
    """
    # In the order of the source, wider types first, so that all are aligned.
    ordered = sorted(pieces, key=lambda piece: -piece.source.torch_dtype.itemsize)
    digest = hashlib.sha256()
    waiting: deque[Future[None]] = deque()
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as pool:

        def write(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[out.write(data) :]

        def put(data: memoryview) -> None:
            if len(waiting) == _WAITING:
                waiting.popleft().result()
            waiting.append(pool.submit(write, data))

        put(memoryview(_header(ordered)))
        reader = _Reader(file, source)
        for piece in ordered:
            done = 0
            for data, count in reader.parts(piece):
                if stop.is_set():
                    raise Stopped
                put(data)
                done += count
                progress(count)
            progress(piece.source.nbytes - done)
        for written in waiting:
            written.result()
    return digest.hexdigest()


def _header(pieces: Sequence[Piece]) -> bytes:
    """Return the header of a safetensors file of these tensors, in their order."""
    values: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in pieces:
        offsets = [place, place := place + piece.nbytes]
        values[piece.source.name] = {"dtype": piece.source.dtype, "shape": list(piece.shape), "data_offsets": offsets}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # The data begin at a multiple of 8, as the format asks of writers.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def send_to_disk(path: Path) -> None:
    """Send a file to the disk, and let it go from the page cache: other files of the cut need the room."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Reader:
    """Reads what is left of tensors of an open file."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file, self._path = file, path
        self._slab = bytearray()
        # Memory that is new is cleared by the system, so each buffer is used again once its bytes are written.
        self._buffers = cycle([memoryview(bytearray(CHUNK)) for _ in range(_WAITING + 1)])

    def parts(self, piece: Piece) -> Iterator[tuple[memoryview, int]]:
        """Yield the bytes of what is left of a tensor, and how many of the source's they took."""
        tensor, keep = piece.source, piece.keep
        if keep is None:
            yield from self._range(tensor.begin, tensor.end)
            return
        outer, rows = prod(tensor.shape[: keep.dim]), tensor.shape[keep.dim]
        inner = prod(tensor.shape[keep.dim + 1 :]) * tensor.torch_dtype.itemsize
        if not outer or not inner or not rows or not len(keep.index):
            return
        # Ranges of rows that lie side by side.
        parts = keep.index.tensor_split((keep.index.diff() != 1).nonzero().flatten() + 1)
        runs = [(int(part[0]), int(part[-1]) + 1) for part in parts]
        if outer == 1:
            place = 0
            for first, last in runs:
                if keep.factor is None:
                    yield from self._range(tensor.begin + first * inner, tensor.begin + last * inner)
                    continue
                step = max(1, CHUNK // inner)
                for row in range(first, last, step):
                    count = min(step, last - row)
                    values = self._read(tensor, row * inner, count * inner).view(count, -1)
                    yield _bytes_of(_scaled(values, keep.factor[place : place + count, None])), count * inner
                    place += count
            return
        step = max(1, CHUNK // (rows * inner))
        for start in range(0, outer, step):
            count = min(step, outer - start)
            size = count * rows * inner
            slab = self._read(tensor, start * rows * inner, size).view(count, rows, -1)
            kept = torch.cat([slab[:, first:last] for first, last in runs], dim=1)
            if keep.factor is not None:
                kept = _scaled(kept, keep.factor[:, None])
            yield _bytes_of(kept), size

    def _range(self, begin: int, end: int) -> Iterator[tuple[memoryview, int]]:
        for place in range(begin, end, CHUNK):
            buffer = next(self._buffers)[: end - place]
            read_exactly(self._file, buffer, place, self._path)
            yield buffer, len(buffer)

    def _read(self, tensor: StoredTensor, offset: int, size: int) -> Tensor:
        """Return numbers that stay what they are until the next are read."""
        if len(self._slab) < size:
            self._slab = bytearray(size)
        data = memoryview(self._slab)[:size]
        read_exactly(self._file, data, tensor.begin + offset, self._path)
        return torch.frombuffer(data, dtype=tensor.torch_dtype)


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    # As a cut in memory folds: rounded once, from float32.
    precise = torch.promote_types(values.dtype, torch.float32)
    return (values.to(precise) * factor.to(precise)).to(values.dtype)


def _bytes_of(values: Tensor) -> memoryview:
    return values.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
