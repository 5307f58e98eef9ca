"""SHA-256 of a folder's files, as `sha256sum` writes and checks them: a file that changed since is found and named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from deadhead.disk.files import write_text
from deadhead.errors import InputError

CHECKSUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>.+)")
_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the list of all files below `folder`, which `sha256sum --check SHA256SUMS` understands.

    Args:
        folder: whatever is written there later is not in the list.
        known: hashes by relative path that need not be computed again.

    Raises:
        InputError: it cannot be written.
    """
    known = known or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{known.get(name) or sha256_of(folder / name)}  {name}\n" for name in names if name != CHECKSUMS_FILE]
    write_text(folder / CHECKSUMS_FILE, "".join(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the hashes that a folder's list has, by relative path; an empty dictionary if there is no list.

    Raises:
        InputError: the list is damaged, or names files outside the folder.
    """
    path = folder / CHECKSUMS_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list of checksums {path} cannot be read: {error}.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or not _is_inside(match["name"]):
            raise InputError(f"The list of checksums {path} is damaged in line {number}; restore it, or delete it.")
        found[match["name"]] = match["sha256"]
    return found


def changed_file(folder: Path, *, among: Collection[str] | None = None) -> str | None:
    """Return the first file of a folder's list that is missing or not what it was, or None if all are as they were.

    Args:
        folder: without a list, nothing is known to have changed.
        among: look at these alone, and at those of them only that are there.

    Raises:
        InputError: the list itself is damaged.
    """
    for name, sha256 in read_checksums(folder).items():
        if among is not None and (name not in among or not (folder / name).exists()):
            continue
        try:
            if sha256_of(folder / name) != sha256:
                return name
        except OSError:
            return name
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
