"""Bytes copied from file to file, with rows left out: what torch indexes, whatever the sizes; hashed; stopped."""

from __future__ import annotations

import errno
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from deadhead import InputError
from deadhead.disk.stored import read_header
from deadhead.streaming import copying
from deadhead.streaming.copying import Keep, Piece, Stopped, copy_pieces

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8)


@st.composite
def kept_tensors(draw: st.DrawFn) -> tuple[Tensor, Keep | None]:
    """Draw a tensor and what is kept of it, rows in any order and more than once."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(_DTYPES))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = torch.randint(-8, 9, shape, generator=seed).to(dtype)
    if draw(st.booleans()):
        return tensor, None
    dim = draw(st.integers(0, len(shape) - 1))
    rows = st.lists(st.integers(0, max(0, shape[dim] - 1)), max_size=12 if shape[dim] else 0)
    index = torch.tensor(draw(rows), dtype=torch.long)
    is_scaled = dtype.is_floating_point and dtype.itemsize > 1 and draw(st.booleans())
    factor = torch.rand(len(index), generator=seed) + 0.5 if is_scaled else None
    return tensor, Keep(dim=dim, index=index, factor=factor)


def _expected(tensor: Tensor, keep: Keep | None) -> Tensor:
    if keep is None:
        return tensor
    # One-byte floats know no index_select.
    bits = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    kept = bits.index_select(keep.dim, keep.index).view(tensor.dtype)
    if keep.factor is None:
        return kept
    factor = keep.factor.view([-1 if dim == keep.dim else 1 for dim in range(tensor.dim())])
    precise = torch.promote_types(tensor.dtype, torch.float32)
    return (kept.to(precise) * factor.to(precise)).to(tensor.dtype)


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@settings(max_examples=150, deadline=None)
@given(held=st.lists(kept_tensors(), min_size=1, max_size=4), chunk=st.sampled_from([1, 3, 16, 64, 8 << 20]))
def test_as_torch_indexes(
    held: list[tuple[Tensor, Keep | None]], chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In pieces of any size, also smaller than one number."""
    folder = tmp_path_factory.mktemp("copy")
    source, target = folder / "source.safetensors", folder / "target.safetensors"
    tensors = {f"tensor {number}": tensor for number, (tensor, _) in enumerate(held)}
    keeps = {f"tensor {number}": keep for number, (_, keep) in enumerate(held)}
    save_file(tensors, source)
    pieces = [Piece(source=stored, keep=keeps[stored.name]) for stored in read_header(source)]
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(copying, "CHUNK", chunk)
        digest = copy_pieces(source, target, pieces, progress=seen.append, stop=threading.Event())
    assert digest == hashlib.sha256(target.read_bytes()).hexdigest()
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())
    written = load_file(target)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = _expected(tensor, keeps[name])
        assert (written[name].shape, written[name].dtype) == (expected.shape, expected.dtype)
        assert _bits(written[name]) == _bits(expected)
    # What lies in a file is aligned to the size of its type, as readers without copies need.
    assert all(found.begin % found.torch_dtype.itemsize == 0 for found in read_header(target))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a file of one tensor, in pieces of 4 KiB."""
    save_file({"x": torch.arange(1 << 14, dtype=torch.float32).view(128, 128)}, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def _copy(source: Path, keep: Keep | None = None, **options: Any) -> str:
    pieces = [Piece(source=stored, keep=keep) for stored in read_header(source)]
    target = source.with_name("target.safetensors")
    return copy_pieces(source, target, pieces, **{"progress": lambda _: None, "stop": threading.Event(), **options})


@pytest.mark.parametrize("keep", [None, Keep(dim=0, index=torch.arange(1, 128)), Keep(dim=1, index=torch.arange(9))])
def test_a_source_that_ends_early(keep: Keep | None, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CHUNK", 4096)

    def shorten(count: int) -> None:
        with source.open("r+b") as file:
            file.truncate(20_000)

    with pytest.raises(InputError, match="ended while it was read"):
        _copy(source, keep, progress=shorten)


def test_stopped(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CHUNK", 4096)
    stop, seen = threading.Event(), []

    def report(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            stop.set()

    with pytest.raises(Stopped):
        _copy(source, progress=report, stop=stop)
    assert len(seen) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is said where more is given, at the end at the latest; the thread that writes keeps nobody waiting."""
    monkeypatch.setattr(copying, "CHUNK", 512)
    source.with_name("target.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        _copy(source)
    assert caught.value.errno == errno.ENOSPC
