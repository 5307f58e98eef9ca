"""Copy one file of weights to another, with rows and columns of some tensors left out, in little memory.

Bytes are read into buffers in one thread, and hashed and written in another.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of what is left of a tensor."""
        return (*shape[: self.dim], len(self.index), *shape[self.dim + 1 :])

    def runs(self) -> list[tuple[int, int]]:
        """Return the index as ranges of rows that lie side by side."""
        found: list[tuple[int, int]] = []
        for row in self.index.tolist():
            if found and found[-1][1] == row:
                found[-1] = (found[-1][0], row + 1)
            else:
                found.append((row, row + 1))
        return found


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the new file: where it comes from, and what stays of it (None: all)."""

    source: StoredTensor
    keep: Keep | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its new shape."""
        return self.source.shape if self.keep is None else self.keep.shape(self.source.shape)

    @property
    def nbytes(self) -> int:
        """Its new size in bytes."""
        return prod(self.shape) * self.source.torch_dtype.itemsize


class Stopped(Exception):
    """The copy was asked to stop."""


def header_bytes(pieces: Sequence[Piece]) -> bytes:
    """Return the header of a safetensors file of these tensors, in their order."""
    values: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in pieces:
        values[piece.source.name] = {
            "dtype": piece.source.dtype,
            "shape": list(piece.shape),
            "data_offsets": [place, place + piece.nbytes],
        }
        place += piece.nbytes
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # The data begin at a multiple of 8, as the format asks of writers.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Return tensors in the order in which they are written: that of the source, wider types first, so all align."""
    return sorted(pieces, key=lambda piece: -piece.source.torch_dtype.itemsize)


def copy_pieces(
    source: Path,
    target: Path,
    pieces: Sequence[Piece],
    *,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> str:
    """Write a safetensors file of tensors of another.

    Args:
        source: the file that holds them.
        target: the new file.
        pieces: its tensors.
        progress: called with bytes of the source as they are done with.
        stop: ends the copy when it is set.

    Returns:
        SHA-256 of what was written, in hexadecimal.

    Raises:
        InputError: the source ended early.
        OSError: the device is full, say.
        Stopped: `stop` was set.
    """
    ordered = file_order(pieces)
    with source.open("rb", buffering=0) as file, _Writer(target) as writer:
        writer.put(memoryview(header_bytes(ordered)))
        reader = _Reader(file.fileno(), source, writer.free)
        for piece in ordered:
            done = 0
            for data, count in reader.parts(piece):
                if stop.is_set():
                    raise Stopped
                writer.put(data)
                done += count
                progress(count)
            progress(piece.source.nbytes - done)
    return writer.sha256


def send_to_disk(path: Path) -> None:
    """Send a file to the disk, and let it go from the page cache: other files of the cut need the room."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Reader:
    """Reads what is left of tensors.

    Args:
        descriptor: of the source.
        path: of it, for messages.
        free: where buffers come from, each until its bytes are written: memory that is new is cleared by the system.
    """

    def __init__(self, descriptor: int, path: Path, free: queue.Queue[memoryview]) -> None:
        self._descriptor, self._path, self._free = descriptor, path, free
        self._slab = bytearray()

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
        runs = keep.runs()
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
            buffer = self._free.get()[: end - place]
            read_exactly(self._descriptor, buffer, place, self._path)
            yield buffer, len(buffer)

    def _read(self, tensor: StoredTensor, offset: int, size: int) -> Tensor:
        """Return numbers that stay what they are until the next are read."""
        if len(self._slab) < size:
            self._slab = bytearray(size)
        data = memoryview(self._slab)[:size]
        read_exactly(self._descriptor, data, tensor.begin + offset, self._path)
        return torch.frombuffer(data, dtype=tensor.torch_dtype)


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    # As a cut in memory folds: rounded once, from float32.
    precise = torch.promote_types(values.dtype, torch.float32)
    return (values.to(precise) * factor.to(precise)).to(values.dtype)


def _bytes_of(values: Tensor) -> memoryview:
    return values.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")


class _Writer:
    """Hashes and writes what it is given, in a thread of its own; an error there is raised where more is given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self.free: queue.Queue[memoryview] = queue.Queue()
        for _ in range(_WAITING + 2):
            self.free.put(memoryview(bytearray(CHUNK)))
        self._waiting: queue.Queue[memoryview | None] = queue.Queue(_WAITING)
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, data: memoryview) -> None:
        if self._error is not None:
            raise self._error
        self._waiting.put(data)

    def __exit__(self, *failure: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None and failure[0] is None:
            raise self._error

    def _run(self) -> None:
        try:
            found = hashlib.sha256()
            with self.path.open("wb", buffering=0) as file:
                for data in self._taken():
                    found.update(data)
                    rest = data
                    while rest:
                        rest = rest[file.write(rest) :]
            self.sha256 = found.hexdigest()
        except BaseException as error:
            self._error = error
            # Whoever puts must not wait for a thread that has gone.
            for _ in self._taken():
                pass

    def _taken(self) -> Iterator[memoryview]:
        """Yield what is put until the end; buffers are free again once the next is asked for."""
        while not self._ended:
            data = self._waiting.get()
            if data is None:
                self._ended = True
                return
            yield data
            if isinstance(data.obj, bytearray):
                self.free.put(memoryview(data.obj))


__all__ = ["Keep", "Piece", "Stopped", "copy_pieces", "send_to_disk"]
