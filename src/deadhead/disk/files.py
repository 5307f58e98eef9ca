"""Files and folders that are complete or absent: everything deadhead writes goes through here."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deadhead.disk.places import checked_path
from deadhead.errors import InputError

# The messages of safetensors, NumPy and torch's own writer for a full disk.
_NATIVE_WORDS = ("No space left", "os error 28", "iostream error", "unexpected pos", "PytorchStreamWriter failed")


# The names that `tempfile` makes from the prefixes below; a replaced folder is moved aside under such a name.
_BEING_WRITTEN = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<aside>\.old)?")


@contextmanager
def no_space_is_input_error(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, a read-only place or a missing permission into an InputError that names `path`."""
    full = InputError(f"No space is left on the device while writing {path}; free some and try again.")
    try:
        yield
    except OSError as error:
        # NumPy reports how much it could write, without an error number.
        is_cut_short = error.errno is None and re.search(r"\d+ requested and \d+ written", str(error))
        if is_cut_short or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{path} cannot be written: {error.strerror}; choose another place.") from error
        failed = Path(str(error.filename))
        is_of_place = failed in (path, *path.parents) or failed.name.startswith(f".{path.name}.")
        if error.errno == errno.ENOENT and is_of_place:
            # A place such as /proc, where nothing can be created.
            raise InputError(f"{path} cannot be written: nothing can be made there; choose another place.") from error
        if error.errno == errno.ENAMETOOLONG:
            # The name of the temporary file or folder beside it.
            raise InputError(f"{path} cannot be written: its name is too long; choose a shorter one.") from error
        if error.errno in (errno.EBUSY, errno.EINVAL):
            raise InputError(f"{path} cannot be replaced by another folder; choose another place.") from error
        if error.errno == errno.EISDIR:
            raise InputError(f"{path} cannot be made a file: it is a folder; choose another place.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise InputError(f"{path} cannot be made a folder: a file of that name is in the way.") from error
        raise
    except Exception as error:
        if any(words in str(error) for words in _NATIVE_WORDS):
            raise full from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, so that a reader sees either the old content or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, so that a reader sees either the old content or the new one, never a part."""
    checked_path(path)
    with no_space_is_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, completely or not at all."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Return `value` as indented JSON; numbers that are not finite become null."""
    return json.dumps(finite(value), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_replaceable(path: Path, markers: tuple[str, ...]) -> None:
    """Check that a folder may be replaced: it is free, or has one of the `markers` of deadhead's folders.

    Raises:
        InputError: `path` is a file, or a folder that holds other things.
    """
    checked_path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} is a file, but a folder is to be written there; choose another place.")
    if not path.is_dir() or any((path / marker).exists() for marker in markers):
        return
    # What a killed process was writing does not count.
    left_overs = (_BEING_WRITTEN.fullmatch(entry.name) for entry in path.iterdir())
    if any(match is None or match["name"] not in markers for match in left_overs):
        raise InputError(
            f"{path} exists and was not written by deadhead (it has none of {', '.join(markers)}); "
            "choose another place or empty it."
        )


def remove_left_overs(folder: Path, name: str | None = None) -> None:
    """Remove what a killed process was writing in a folder, for `name` or any; put back what it had moved aside."""
    for entry in folder.iterdir():
        match = _BEING_WRITTEN.fullmatch(entry.name)
        if match is None or name not in (None, match["name"]):
            continue
        if match["aside"] and not (folder / match["name"]).exists():
            # The process was killed between the two moves of `replaced_folder`.
            entry.rename(folder / match["name"])
        else:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def remove_folder(folder: Path, *, last: str) -> None:
    """Remove a folder, its file `last` at the end, so that a half removed folder can still be recognised."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != last:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces `path` if the block succeeds, and else is removed.

    The old folder is moved aside before the new one is moved in, so that a reader never sees a mixture.
    """
    path = checked_path(path).resolve()  # "." has no name to write beside
    with no_space_is_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        old = temporary.with_name(temporary.name + ".old")
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException as error:
            if old.exists() and not path.exists():
                os.replace(old, path)
            if isinstance(error, InputError) and temporary.name in str(error):
                # The name of the temporary folder would mean nothing to the user.
                raise InputError(re.sub(rf"\S*{re.escape(temporary.name)}\S*", str(path), str(error))) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
