"""SHA-256 of a folder's files, in the format of `sha256sum`, to find and name a file that has changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub.utils.sha import sha_fileobj

from deadhead.disk.files import write_text
from deadhead.errors import InputError

CHECKSUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>.+)")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the checksums of all files below `folder`; `known` are hashes, by relative path, that need no computing.

    Raises:
        InputError: the list cannot be written.
    """
    known = known or {}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{known.get(name) or sha256_of(folder / name)}  {name}\n" for name in names if name != CHECKSUMS_FILE]
    write_text(folder / CHECKSUMS_FILE, "".join(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the hashes in a folder's list, by relative path; an empty dictionary if there is no list.

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
        if match is None or match["name"].startswith("/") or ".." in PurePosixPath(match["name"]).parts:
            raise InputError(f"The list of checksums {path} is damaged in line {number}; restore it, or delete it.")
        found[match["name"]] = match["sha256"]
    return found


def changed_file(folder: Path, *, among: Collection[str] | None = None) -> str | None:
    """Return the first file of a folder's list that is missing or has changed; None if there is none, or no list.

    With `among`, only these files are checked, and those that are missing are ignored.

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
