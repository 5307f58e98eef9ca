"""Paths from users: those that no file system can have are refused before one is asked."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deadhead.errors import InputError

# The most bytes of a name, and of a whole path, in the usual file systems.
_MOST_OF_NAME, _MOST = 255, 4095


def checked_path(path: str | Path) -> Path:
    """Return a path; InputError if no file system can have it, because of its length or its characters."""
    try:
        names = os.fsencode(path).split(b"/")
        longest, whole = max(map(len, names)), len(os.fsencode(os.path.abspath(path)))
    except UnicodeEncodeError:
        raise _refusal(path, "it holds half a character, which no name can hold") from None
    if "\0" in str(path):
        raise _refusal(path, "it holds a null character, which no name can hold")
    if longest > _MOST_OF_NAME:
        raise _refusal(path, f"it is too long: a name of {longest:,} bytes, where {_MOST_OF_NAME} are the most")
    if whole > _MOST:
        raise _refusal(path, f"it is too long: {whole:,} bytes, where {_MOST:,} are the most")
    return Path(path)


@contextmanager
def empty_parents_gone(place: Path) -> Iterator[None]:
    """Remove the parent folders that the block made, if it fails and has left nothing in them."""
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            # The folder is not empty, or was not made.
            with suppress(OSError):
                folder.rmdir()
        raise


def _refusal(path: str | Path, why: str) -> InputError:
    return InputError(f"The path {reprlib.repr(str(path))} cannot be used: {why}; choose another.")
