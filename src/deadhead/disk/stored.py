"""What a safetensors checkpoint holds: its files, and the place of each tensor in them. No tensor is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deadhead.disk.reading import parse_json, read_object, shown
from deadhead.errors import InputError

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Endings of the names of other files that may hold weights.
_OTHER_FORMATS = (".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx")

# For each type of the format, its name in torch and the bytes of a number.
_TYPES: Mapping[str, tuple[str, int]] = {
    **{f"U{bits}": (f"uint{bits}", bits // 8) for bits in (8, 16, 32, 64)},
    **{f"I{bits}": (f"int{bits}", bits // 8) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": (f"float{bits}", bits // 8) for bits in (16, 32, 64)},
    "BOOL": ("bool", 1),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
# Bytes of a tensor that are read at a time.
_READ = 4 << 20
# The limit of the format's own reader; a longer header is invalid.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: its name, the file's name, and its bytes in the file, from `begin` up to `end`.

    `dtype` is the format's own name, such as "BF16".
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype in torch."""
        import torch

        return getattr(torch, _TYPES[self.dtype][0])


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """The weights of a folder: its files in order, and the tensors of each in the order of their bytes."""

    folder: Path
    files: Mapping[str, tuple[StoredTensor, ...]]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors, by name."""
        return {tensor.name: tensor for tensors in self.files.values() for tensor in tensors}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensors in self.files.values() for tensor in tensors)

    def read_into(self, tensor: StoredTensor, out: torch.Tensor) -> None:
        """Read a tensor's values, a few megabytes at a time, into a contiguous tensor of its shape and any dtype.

        Raises:
            InputError: the file has become shorter.
        """
        import torch

        path, dtype = self.folder / tensor.file, tensor.torch_dtype
        values = out.view(-1)
        step = _READ // dtype.itemsize
        data = bytearray(min(_READ, tensor.nbytes))
        with path.open("rb", buffering=0) as file:
            for start in range(0, tensor.numel, step):
                count = min(step, tensor.numel - start)
                part = memoryview(data)[: count * dtype.itemsize]
                read_exactly(file, part, tensor.begin + start * dtype.itemsize, path)
                values[start : start + count] = torch.frombuffer(part, dtype=dtype)


def read_exactly(file: FileIO, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` with the bytes at `offset` of a file that no other thread reads from.

    Raises:
        InputError: the file ends too early.
    """
    file.seek(offset)
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise InputError(f"{path} ended while it was read; the file was changed or is damaged, fetch it again.")
        buffer = buffer[count:]


def weights_size(folder: Path) -> int:
    """Return the bytes of a folder's safetensors files; 0 if there are none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())


def weight_files(folder: Path, index: Path) -> list[Path]:
    """Return the files that an index names; none if there is neither an index nor pickled weights.

    Raises:
        InputError: a file is missing, or the weights are pickled.
    """
    if not index.is_file():
        pickles = sorted(file.name for file in folder.glob("*model*.bin*"))
        if pickles:
            raise InputError(
                f"The weights in {folder} are pickled ({pickles[0]}), and reading a pickle can run any code; where you "
                "trust them, load them with transformers and save them again with save_pretrained."
            )
        return []
    files = [folder / name for name in sorted(set(_read_index(index).values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"The index {index} names a file {file.name}, but it is not there; fetch it again.")
    return files


def no_weights(folder: Path) -> InputError:
    """Return the error for a folder without weights, which names what the folder has instead."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    ours = next((name for name in names if name.endswith((".safetensors", ".gguf"))), None)
    other = next((name for name in names if name.endswith(_OTHER_FORMATS)), None)
    how = "fetch it again"
    if ours is not None:
        how = f"the folder holds {ours}: name that, if it is a GGUF file, or give it this name, if it holds all of them"
    elif other is not None:
        how = f"the folder holds {other}, which is of another format: load that elsewhere, and save it as safetensors"
    return InputError(f"Weights were expected at {folder / WEIGHTS_FILE}, but there is no such file; {how}.")


def read_stored(folder: Path) -> StoredCheckpoint:
    """Read the headers of a folder's safetensors files, and check that they and the index are correct.

    Raises:
        InputError: there are no files, one is missing, cut short or damaged, or the index names other tensors, or files
            outside the folder.
    """
    index = folder / INDEX_FILE
    is_sharded = index.is_file()
    is_single = not is_sharded and (folder / WEIGHTS_FILE).is_file()
    paths = [folder / WEIGHTS_FILE] if is_single else weight_files(folder, index)
    if not paths:
        raise no_weights(folder)
    files = {path.name: read_header(path) for path in paths}
    if is_sharded:
        weight_map = _read_index(index)
        found: dict[str, str] = {}
        for name, tensors in files.items():
            for tensor in tensors:
                if tensor.name in found:
                    raise InputError(f"Tensor {tensor.name} is in two files of {folder}: {found[tensor.name]}, {name}.")
                found[tensor.name] = name
        for missing, _ in sorted(weight_map.items() ^ found.items()):
            raise InputError(
                f"The index {index} and the files it names disagree on tensor {missing}: by the index it is in "
                f"{weight_map.get(missing, 'none')}, but it is in {found.get(missing, 'none')}; fetch the checkpoint "
                "again."
            )
    return StoredCheckpoint(folder=folder, files=files)


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor of a sharded checkpoint, from an index that names files in its own folder."""
    weight_map = read_object(path, what="index of weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f'The index {path} must have a "weight_map" from names of tensors to names of files.')
    for name in weight_map.values():
        if set("/\\\0") & set(name) or not name.endswith(".safetensors") or len(name) > 200:
            raise InputError(
                f"The index {path} names {shown(name)}, but only .safetensors files of its own folder may be there."
            )
    return weight_map


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a safetensors file in the order of their bytes, which must leave no gap.

    Raises:
        InputError: the file is cut short, or has no valid header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise InputError(f"The weights in {path} are damaged or cut short: its header does not fit the file.")
            header = file.read(length)
    except OSError as error:
        raise InputError(f"The weights {path} cannot be read: {error.strerror}.") from None
    values = parse_json(header, name=f"The weights in {path} are damaged: their header")
    if not isinstance(values, dict):
        raise InputError(f"The weights in {path} are damaged: the header is not a JSON object.")
    tensors = [_tensor(path, name, value, 8 + length) for name, value in values.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    place = 8 + length
    for tensor in tensors:
        if tensor.begin != place:
            what = "overlaps another tensor" if tensor.begin < place else "leaves a gap before it"
            raise InputError(f"The weights in {path} are damaged: by the header, {tensor.name} {what}.")
        place = tensor.end
    if place != size:
        what = "cut short" if place > size else "damaged"
        raise InputError(f"The weights in {path} are {what}: {place} bytes were expected, but there are {size}.")
    return tuple(tensors)


def _tensor(path: Path, name: str, value: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        is_number = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
        is_true = is_number and dtype in _TYPES and end - begin == math.prod(shape) * _TYPES[dtype][1]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"The weights in {path} are damaged: the header does not describe tensor {name}.") from None
    if not is_true:
        known = "" if dtype in _TYPES else f", and its type {dtype!r} is not known"
        raise InputError(
            f"The weights in {path} are damaged: by the header, tensor {name} has shape {list(shape)} and bytes "
            f"{begin} to {end}{known}."
        )
    return StoredTensor(name=name, file=path.name, dtype=dtype, shape=shape, begin=start + begin, end=start + end)
