"""Checksums of a folder's files, in the form that `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from deadhead.files import write_text

CHECKSUMS_FILE = "SHA256SUMS"
_CHUNK = 4 << 20


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write `SHA256SUMS` with the hash of every other file below `folder`.

    Args:
        folder: it.
        known: hashes that are known already, by the file's path from `folder`.
    """
    known = known or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = [f"{known.get(name) or file_sha256(folder / name)}  {name}\n" for name in names if name != CHECKSUMS_FILE]
    write_text(folder / CHECKSUMS_FILE, "".join(lines))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
