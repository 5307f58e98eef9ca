"""Text on this machine: files, directories, and the Python standard library's own source."""

from __future__ import annotations

import difflib
import os
import re
import stat
import sysconfig
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from deadhead.data.formats import PROBE_BYTES, Format, Found, Unpacked, found_in, is_packed, refuse_looks
from deadhead.data.pieces import Document, Documents, readable
from deadhead.data.tables import Rows
from deadhead.disk.places import checked_path
from deadhead.errors import InputError, RunWarning

ReadRows = Callable[[Mapping[str, Sequence[Found]], Format, Path], Mapping[str, Rows]]


class Sized(NamedTuple):
    """A file, its document or table, and its size in bytes."""

    found: Found
    document: Document | Found
    size: int


# Names that data sets, and parts of files' names, have for the splits; the first one that is there counts.
SPLIT_NAMES = {"train": ("train",), "valid": ("validation", "valid", "val", "dev"), "test": ("test",)}
_SPLIT_WORDS = {"training": "train"} | {name: split for split, names in SPLIT_NAMES.items() for name in names}

# Top-level names, fixed so that the text depends on Python's version only. Left out: what Python 3.13 no longer has,
# what is made by the build of one platform, aliases of a few lines, and programs that only come along (idlelib,
# turtledemo, lib2to3, ensurepip).
_STDLIB_NAMES = """
    __future__ _collections_abc _compat_pickle _compression _markupbase _osx_support _py_abc _pydecimal _pyio
    _sitebuiltins _strptime _threading_local _weakrefset abc antigravity argparse ast asyncio base64 bdb bisect bz2
    cProfile calendar cmd code codecs codeop collections colorsys compileall concurrent configparser contextlib
    contextvars copy copyreg csv ctypes curses dataclasses datetime dbm decimal difflib dis doctest email encodings
    enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip
    hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache locale logging lzma
    mailbox mimetypes modulefinder multiprocessing netrc ntpath nturl2path numbers opcode operator optparse os pathlib
    pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc
    pydoc_data queue quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site
    smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig
    tabnanny tarfile tempfile textwrap this threading timeit tkinter token tokenize tomllib trace traceback tracemalloc
    tty turtle types typing unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile
    zipimport zoneinfo
"""
_STDLIB_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "_bundled"}


def path_parts(path: Path, *, data_format: Format | None, read: ReadRows) -> dict[str, Documents | Rows]:
    """Find the documents at a path, grouped by the split that the files' names give, otherwise all as "train".

    For a directory, these are the files below it, sorted by their relative path, without hidden ones. UTF-8 text, JSON,
    CSV and Parquet are not mixed: the format with the most bytes is read. Splits in names are used if there is one for
    training and another one, and if the files whose names give no split (a licence, a note) are the smaller part of all
    bytes; those files are then left out.

    Args:
        path: path of a file or a directory.
        data_format: format of the file, whatever its name and contents; of a directory, only files of this format are
            read, or all of them if none has it or it is "text". None detects formats by names and contents.
        read: function that reads files with fields.

    Warns:
        RunWarning: files of another format, or without text, are left out.
    """
    checked_path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_missing(path)) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"A text file or a directory was expected at {path}, but it cannot be read: {why}.") from None
    place = cache(Unpacked)
    if stat.S_ISREG(mode):
        found = _as_asked(found_in(path, place), data_format)
        if found.format != "text" and found.path.stat().st_size:
            return dict(read({"train": [found]}, found.format, path))
        return {"train": Documents([_checked(found)])}
    if not stat.S_ISDIR(mode):
        raise InputError(
            f"A text file or a directory was expected, but {path} is neither; write the text to a file first."
        )
    files = list(_files_below(path))
    if not files:
        raise InputError(f"Text files were expected below {path}, but it has no files that are not hidden.")
    groups, lost = _by_format(path, files, data_format, place)
    if not groups:
        first = min(files, key=lambda file: file.relative_to(path).as_posix())
        raise InputError(
            f"Text files were expected below {path}, but none of its {len(files)} files, such as {first.name}, holds "
            "UTF-8 text; name a directory with text files."
        )
    chosen = max(groups, key=lambda name: sum(each.size for each in groups[name]))
    others = [each.found.label for name, group in groups.items() if name != chosen for each in group]
    if others:
        warnings.warn(
            f"{path} is read as {chosen}; {len(others)} of its files have another format and are left out, such as "
            f"{Path(others[0]).name} (choose with data_format).",
            RunWarning,
            stacklevel=2,
        )
    if lost:
        warnings.warn(
            f"{len(lost)} of the files below {path} hold no UTF-8 text and are left out, such as {lost[0].name}; "
            "convert them to UTF-8 if they are text in another encoding.",
            RunWarning,
            stacklevel=2,
        )
    parts = _own_splits(groups[chosen])
    if chosen == "text":
        return {
            split: Documents(each.document for each in part if isinstance(each.document, Document))
            for split, part in parts.items()
        }
    for each in groups[chosen]:
        _as_asked(each.found, data_format)
    return dict(read({split: [each.found for each in part] for split, part in parts.items()}, chosen, path))


def _by_format(
    path: Path, files: Sequence[Path], data_format: Format | None, place: Callable[[], Unpacked]
) -> tuple[dict[Format, list[Sized]], list[Path]]:
    """Return the non-empty files below a directory by their format, and those that hold no text.

    A packed file that cannot be read is refused, because its contents are unknown.
    """
    everything: list[Found] = []
    lost: list[Path] = []
    for file in sorted(files, key=lambda file: file.relative_to(path).as_posix()):
        try:
            everything.append(found_in(file, place))
        except InputError:
            if is_packed(file):
                raise
            lost.append(file)
    if data_format is not None:
        asked = [found for found in everything if found.format == data_format != "text"]
        everything = [_as_asked(found, data_format) for found in asked or everything]
    groups: dict[Format, list[Sized]] = {}
    for found in everything:
        if not (size := found.path.stat().st_size):
            continue
        try:
            held = _checked(found) if found.format == "text" else found
        except InputError:
            lost.append(Path(found.label))
        else:
            groups.setdefault(found.format, []).append(Sized(found, held, size))
    return groups, lost


def _as_asked(found: Found, data_format: Format | None) -> Found:
    """Return a file in the format asked for; if none is, refuse a file whose format shows only in its contents."""
    if data_format is not None:
        return replace(found, format=data_format)
    if found.looks:
        raise refuse_looks(found)
    return found


def stdlib_documents() -> Documents:
    """Return the source files of the standard library, sorted by relative path, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for name in _STDLIB_NAMES.split():
        module, package = root / f"{name}.py", root / name
        if module.is_file():
            files.append(module)
        elif package.is_dir():
            below = (file for file in package.rglob("*.py") if file.is_file())
            files += [file for file in below if not _STDLIB_SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)]
    # A few files hold another encoding on purpose, and some packages have an empty __init__.py.
    documents = Documents()
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        with suppress(InputError):
            documents.append(_checked(Found(label=str(file), path=file, format="text")))
    if documents:
        return documents
    raise InputError(
        f"The standard library's source was expected in {root}, but there is none; name a text file instead."
    )


def _checked(found: Found) -> Document:
    """Return the document of a whole file after reading it once; raise InputError if it is not text."""
    path = found.path
    with readable(found.label), path.open("rb") as stream:
        size, head = os.fstat(stream.fileno()).st_size, stream.read(PROBE_BYTES)
    # The mark of UTF-8 is no text.
    start = len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0
    if len(head) == start:
        raise InputError(f"Text was expected in {found.label}, but the file is empty; name one with text in it.")
    document = Document(label=found.label, open=partial(_open, found), start=start, stop=size)
    for _ in document.pieces():
        pass
    return document


def _open(found: Found) -> BinaryIO:
    """Open a file; an unpacked file is kept as long as this can be called."""
    return found.path.open("rb")


def _files_below(root: Path) -> Iterator[Path]:
    """Yield the regular files below a directory that are not hidden; each folder once, so that links make no loop."""

    def refuse(error: OSError) -> None:
        if error.filename == str(root):
            raise InputError(f"The directory {root} cannot be read: {error.strerror}.") from None

    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted((name for name in names if not name.startswith(".")), reverse=True)
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        yield from (path for path in paths if os.path.isfile(path))


def _own_splits(files: Sequence[Sized]) -> dict[str, list[Sized]]:
    """Group files by the split that their names give, if those files are the greater part of the text."""
    splits: dict[str, list[Sized]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", Path(file.found.label).name.lower())
        found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
        if len(found) == 1:
            splits.setdefault(found.pop(), []).append(file)
    marked = sum(file.size for part in splits.values() for file in part)
    if "train" in splits and len(splits) > 1 and 2 * marked > sum(file.size for file in files):
        return splits
    return {"train": list(files)}


def _missing(path: Path) -> str:
    """Return the message for a path that does not exist, with the nearest name that does."""
    names = ["stdlib", "self"] if path.parent == Path() else []
    with suppress(OSError):
        names += os.listdir(path.parent)
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "check the path."
    return f"A text file, a directory, stdlib or hf:NAME was expected, but {path} does not exist; {hint}"
