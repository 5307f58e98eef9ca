"""Detection of a file's format (text or rows with fields) by its ending and first bytes; packed files are unpacked."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
import weakref
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from deadhead.data.pieces import readable
from deadhead.disk.files import no_space_is_input_error
from deadhead.errors import InputError, require_extra

Format = Literal["text", "json", "csv", "parquet"]

PROBE_BYTES = 8192
_ENDINGS: dict[str, Format] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_OTHERWISE_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
# A line, or a file, that begins with the first key of a JSON object.
_JSON = re.compile(rb'\s*(\[\s*)?\{\s*"(\\.|[^"\\\n])*"\s*:')


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file of text or rows.

    `looks` is True if the format was detected by the first bytes rather than by the ending. `path` is the file itself
    or, if it was packed, the unpacked file, which is deleted together with its `place`.
    """

    label: str
    path: Path
    format: Format
    looks: bool = False
    place: Unpacked | None = None


class Unpacked:
    """A folder for unpacked files, which is deleted with this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="deadhead-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def unpack(self, path: Path, packing: str) -> Path:
        """Unpack a file into this folder; return its path, with the name that it had before it was packed."""
        name = path.name[: -len(packing)] if path.name.lower().endswith(packing) else path.name
        target = Path(tempfile.mkdtemp(dir=self.folder)) / (name or "text")
        with no_space_is_input_error(target), readable(path):
            try:
                with _opened(path, packing) as source, target.open("wb") as written:
                    shutil.copyfileobj(source, written, 1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _damaged(path, packing) from error
            except OSError as error:
                # The zstd of pyarrow says no more than this.
                if error.errno is None:
                    raise _damaged(path, packing) from error
                raise
        return target


def _opened(path: Path, packing: str) -> BinaryIO:
    if packing == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    require_extra("data", "pyarrow", what=f"Unpacking {path.name}")
    import pyarrow  # type: ignore[import-untyped]

    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


def _damaged(path: Path, packing: str) -> InputError:
    return InputError(f"A complete {packing} file was expected, but {path} is damaged or truncated; get it again.")


def is_packed(path: Path) -> bool:
    """Return whether a file is packed in a supported way, by its contents or its name."""
    try:
        return path.suffix.lower() in _PACKED.values() or _head(path).startswith(tuple(_PACKED))
    except InputError:
        return False


def found_in(path: Path, place: Callable[[], Unpacked]) -> Found:
    """Return what a file holds; `place` is the folder to unpack it into, if it is packed.

    Raises:
        InputError: the file cannot be read or unpacked.
    """
    unpacked: Unpacked | None = None
    file = path
    while (packing := next((end for magic, end in _PACKED.items() if _head(file).startswith(magic)), None)) is not None:
        unpacked = unpacked or place()
        file = unpacked.unpack(file, packing)
    head = _head(file)
    if head and file.suffix.lower() in _PACKED.values():
        raise InputError(
            f"A {file.suffix} file was expected, but {path} is not packed; take {file.suffix} off its name."
        )
    for magic, name in _OTHERWISE_PACKED.items():
        if head.startswith(magic) and b"\0" in head:
            raise InputError(
                f"Files packed with gzip or zstd are read, but {path} is packed with {name}; unpack it first."
            )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"UTF-8 text was expected in {path}, but it begins as UTF-16 does; convert it to UTF-8.")
    told = _ENDINGS.get(file.suffix.lower())
    if head.startswith(b"PAR1"):
        told = "parquet"
    elif b"\0" in head:
        raise InputError(
            f"UTF-8 text was expected in {path}, but it looks binary (byte {head.index(0)} is NUL); "
            "name a text file, or convert it to UTF-8 if it holds text in another encoding."
        )
    return Found(
        label=str(path),
        path=file,
        format=told or ("json" if _looks_json(head) else "text"),
        looks=told is None and _looks_json(head),
        place=unpacked,
    )


def _looks_json(head: bytes) -> bool:
    """Return whether a file is JSON, by its beginning: one value, or an object on every line."""
    head = head.removeprefix(BOM_UTF8)
    if not _JSON.match(head):
        return False
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()]
    try:
        for line in lines[:1]:
            json.loads(line)
    except ValueError:
        return True  # one value on several lines
    return all(line.lstrip().startswith(b"{") for line in lines)


def _head(path: Path) -> bytes:
    with readable(path), path.open("rb") as stream:
        return stream.read(PROBE_BYTES)


def refuse_looks(found: Found) -> InputError:
    """Return the error for a file that looks like rows but is not named like them."""
    return InputError(
        f"Text was expected in {found.label}, but it looks like JSON; choose data_format (--data-format) json to read "
        "its fields, or text to read it as plain text."
    )
