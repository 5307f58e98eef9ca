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
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deadhead.disk.stored import StoredTensor, read_exactly

# Bytes that are read at once, and how many such pieces may wait to be written.
CHUNK = 8 << 20
_WAITING = 3


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The rows that a cut keeps of a tensor along a dimension.

    `index` (n,) holds the rows that stay, in their new order, possibly with repetitions; `factor` (n,) holds what they
    are multiplied by, or is None.
    """

    dim: int
    index: Tensor
    factor: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the new file: its source, and the part of it that stays (None: all).

    `fitted` names the new values of that part and the file that holds them.
    """

    source: StoredTensor
    keep: Keep | None = None
    fitted: tuple[Path, StoredTensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the new tensor."""
        shape, keep = self.source.shape, self.keep
        return shape if keep is None else (*shape[: keep.dim], len(keep.index), *shape[keep.dim + 1 :])

    @property
    def nbytes(self) -> int:
        """Size of the new tensor, in bytes."""
        return prod(self.shape) * self.source.torch_dtype.itemsize


def read_piece(folder: Path, piece: Piece) -> Tensor:
    """Return the part that stays of a tensor of a checkpoint in this folder.

    Raises:
        InputError: the file ended early.
    """
    values = torch.empty(piece.shape, dtype=piece.source.torch_dtype)
    data, place = _bytes_of(values), 0
    path = folder / piece.source.file
    with path.open("rb", buffering=0) as file:
        for part, _ in _parts(file, path, piece):
            data[place : place + len(part)] = part
            place += len(part)
    return values


class Stopped(Exception):
    """Raised when a copy was asked to stop."""


def copy_pieces(
    source: Path, target: Path, pieces: Sequence[Piece], *, progress: Callable[[int], None], stop: threading.Event
) -> str:
    """Write a safetensors file from tensors of another one; return the SHA-256 of the new file, in hexadecimal.

    `progress` is called with the number of source bytes that are newly done; setting `stop` ends the copy.

    Raises:
        InputError: the source ended early.
        OSError: the file cannot be written, for instance because the device is full.
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
        for piece in ordered:
            done = 0
            for data, count in _parts(file, source, piece):
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
    """Flush a file to disk and drop it from the page cache, which other files of the cut need."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parts(file: FileIO, path: Path, piece: Piece) -> Iterator[tuple[memoryview, int]]:
    """Yield the bytes of a new tensor, each time with the number of source bytes that they used."""
    if piece.fitted is not None:
        path, stored = piece.fitted
        with path.open("rb", buffering=0) as other:
            # Of the source nothing is read.
            yield from ((data, 0) for data, _ in _parts(other, path, Piece(source=stored)))
        return
    tensor, keep = piece.source, piece.keep

    def read(offset: int, size: int) -> memoryview:
        data = np.empty(size, dtype=np.uint8).data
        read_exactly(file, data, tensor.begin + offset, path)
        return data

    def numbers(offset: int, size: int) -> Tensor:
        return torch.frombuffer(read(offset, size), dtype=tensor.torch_dtype)

    if not piece.nbytes:
        return
    ranges, outer, rows, inner = [(0, 1)], 1, 1, tensor.nbytes
    if keep is not None:
        outer, rows = prod(tensor.shape[: keep.dim]), tensor.shape[keep.dim]
        inner = tensor.nbytes // (outer * rows)
        # Ranges of rows that lie side by side.
        parts = keep.index.tensor_split((keep.index.diff() != 1).nonzero().flatten() + 1)
        ranges = [(int(part[0]), int(part[-1]) + 1) for part in parts]
    factor = None if keep is None else keep.factor
    if outer > 1:
        step = max(1, CHUNK // (rows * inner))
        for start in range(0, outer, step):
            count = min(step, outer - start)
            slab = numbers(start * rows * inner, count * rows * inner).view(count, rows, -1)
            kept = torch.cat([slab[:, first:last] for first, last in ranges], dim=1)
            yield _bytes_of(kept if factor is None else _scaled(kept, factor[:, None])), count * rows * inner
    elif factor is None:
        for first, last in ranges:
            for place in range(first * inner, last * inner, CHUNK):
                size = min(CHUNK, last * inner - place)
                yield read(place, size), size
    else:
        place, step = 0, max(1, CHUNK // inner)
        for first, last in ranges:
            for row in range(first, last, step):
                count = min(step, last - row)
                values = numbers(row * inner, count * inner).view(count, -1)
                yield _bytes_of(_scaled(values, factor[place : place + count, None])), count * inner
                place += count


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    # As a cut in memory folds: rounded once, from float32.
    precise = torch.promote_types(values.dtype, torch.float32)
    return (values.to(precise) * factor.to(precise)).to(values.dtype)


def _bytes_of(values: Tensor) -> memoryview:
    return values.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
