"""Text on this machine: a file, a directory, and the Python standard library's own source."""

from __future__ import annotations

import difflib
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from deadhead.data.pieces import Document, Documents, readable
from deadhead.errors import InputError

_BINARY_PROBE_BYTES = 8192
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


def path_documents(path: Path) -> dict[str, Documents]:
    """Find the documents at a path, by the split that the files' names tell, or else all as "train".

    Of a directory these are all files below it that are UTF-8 text, sorted by their relative path, hidden ones left
    out. Its own splits count when there is one for training and another, and the files whose names tell no split are
    the smaller part of all bytes (a licence, a note): those are then left out.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_missing(path)) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"A text file or a directory was expected at {path}, but it cannot be read: {why}.") from None
    if stat.S_ISREG(mode):
        return {"train": Documents([_checked(path)])}
    if not stat.S_ISDIR(mode):
        raise InputError(
            f"A text file or a directory was expected, but {path} is neither; write the text to a file first."
        )
    files = list(_files_below(path))
    if documents := _text_files(files, path):
        return _own_splits(documents)
    if not files:
        raise InputError(f"Text files were expected below {path}, but it has no files that are not hidden.")
    first = min(files, key=lambda file: file.relative_to(path).as_posix())
    raise InputError(
        f"Text files were expected below {path}, but of its {len(files)} files none is UTF-8 text that isn't empty, "
        f"{first.name} for one; name a directory with text files."
    )


def stdlib_documents() -> Documents:
    """Find the source files of the standard library, sorted by relative path, without tests."""
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
    if documents := _text_files(files, root):
        return documents
    raise InputError(
        f"The standard library's source was expected in {root}, but there is none; name a text file instead."
    )


def _checked(path: Path) -> Document:
    """A document of a whole file, after reading it once to see that it is text, or else an InputError."""
    with readable(path), path.open("rb") as stream:
        size, head = os.fstat(stream.fileno()).st_size, stream.read(_BINARY_PROBE_BYTES)
    if not head:
        raise InputError(f"Text was expected in {path}, but the file is empty; name one with text in it.")
    if b"\0" in head:
        raise InputError(
            f"UTF-8 text was expected in {path}, but it looks binary (byte {head.index(0)} is NUL); "
            "name a text file, or convert it to UTF-8 if it holds text in another encoding."
        )
    document = Document(label=str(path), open=lambda: path.open("rb"), stop=size)
    for _ in document.pieces():
        pass
    return document


def _text_files(files: Sequence[Path], root: Path) -> Documents:
    """The documents of those files that can be read and are text, sorted by their path from `root`."""
    documents = Documents()
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        with suppress(InputError):
            documents.append(_checked(file))
    return documents


def _files_below(root: Path) -> Iterator[Path]:
    """Regular files below a directory that are not hidden; each folder once, so that links can't make a loop."""

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


def _own_splits(documents: Documents) -> dict[str, Documents]:
    """Sort documents by the split that their file names tell, if those are the greater part of the text."""
    splits: dict[str, Documents] = {}
    for document in documents:
        words = re.split(r"[^a-z]+", Path(document.label).name.lower())
        found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
        if len(found) == 1:
            splits.setdefault(found.pop(), Documents()).append(document)
    marked = sum(document.stop for part in splits.values() for document in part)
    if "train" in splits and len(splits) > 1 and 2 * marked > sum(document.stop for document in documents):
        return splits
    return {"train": documents}


def _missing(path: Path) -> str:
    """The sentence for a path where nothing is, with the nearest name there is."""
    names = ["stdlib"] if path.parent == Path() else []
    with suppress(OSError):
        names += os.listdir(path.parent)
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else "check the path."
    return f"A text file, a directory, stdlib or hf:NAME was expected, but there is no {path}; {hint}"
