"""GGUF files as models to begin with: finding one, and reading it by transformers, with weights as plain numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deadhead.disk.places import checked_path
from deadhead.errors import InputError, first_line, require_extra

_MAGIC = b"GGUF"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def gguf_file(path: str | Path) -> Path | None:
    """Return the GGUF file at `path`, or the only one in a folder without a config.json; None for other paths.

    Raises:
        InputError: the file is missing, is not a GGUF file or only a part of one, or the folder holds several.
    """
    path = checked_path(path)
    if path.suffix.lower() != ".gguf" or path.is_dir():
        files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
        if not files:
            return None
        if len(files) > 1:
            raise InputError(
                f"One model was expected in {path}, but it holds {len(files)} GGUF files; name one, such as {files[0]}."
            )
        path = files[0]
    if not path.is_file():
        raise InputError(f"A GGUF file was expected at {path}, but there is none.")
    with path.open("rb") as stream:
        is_gguf = stream.read(len(_MAGIC)) == _MAGIC
    if not is_gguf:
        raise InputError(f"A GGUF file was expected at {path}, but it does not begin as one does; is it whole?")
    if _SHARD.search(path.stem):
        raise InputError(
            f"{path} is one part of a model in several files, which is not read; join them first: "
            f"llama-gguf-split --merge {path.name} whole.gguf."
        )
    return path


@contextmanager
def reading_gguf(file: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the folder and the argument with which `from_pretrained` reads `what` from a GGUF file.

    Raises:
        InputError: the package gguf is missing, or transformers, in the block, could not read the file.
    """
    require_extra("gguf", "gguf", what=f"Reading {file}")
    try:
        yield str(file.parent), {"gguf_file": file.name}
    except MemoryError:
        raise
    except Exception as error:  # transformers' reader raises many kinds, down to those of gguf and tokenizers
        raise InputError(f"transformers could not read the {what} in {file}: {first_line(error)}.") from error
