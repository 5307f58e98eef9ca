"""A corpus: text for training, validation and test, read as a stream from a file, a directory or a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from deadhead.data.chat import Chat
from deadhead.data.formats import Format, Found
from deadhead.data.hub import hub_rows
from deadhead.data.local import path_parts, stdlib_documents
from deadhead.data.pieces import Documents, Piece
from deadhead.data.tables import Rows, file_rows
from deadhead.errors import InputError, typed

SPLITS = ("train", "valid", "test")
_FEW_DOCUMENTS = 40
_Part = Rows | Documents


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text in three splits, each with a reader that opens it as a stream of pieces; it is never in memory as a whole.

    `name` is the source as the user wrote it: "stdlib", a path, "hf:...". `chat` is set for conversations.
    """

    name: str
    is_chat: bool = False
    readers: Mapping[str, Callable[[], Iterator[Piece]]] = field(repr=False)

    @typed
    def pieces(self, split: str) -> Iterator[Piece]:
        """Yield the text of a split, piece by piece.

        Raises:
            InputError: there is no such split, or the text cannot be read.
        """
        if split not in self.readers:
            raise InputError(f"A split was expected ({', '.join(SPLITS)}), but got {split!r}.")
        return self.readers[split]()

    def documents(self, split: str) -> Iterator[str]:
        """Yield the text of a split as `pieces` does: documents, or pieces of at most 256 KiB of longer documents."""
        return (piece.text for piece in self.pieces(split))

    def sha256(self) -> str:
        """Hash of the whole text in order, including the ends of splits, documents and answers."""
        return self._hash_and_size[0]

    @property
    def num_bytes(self) -> int:
        """Size of the whole text in UTF-8, in bytes."""
        return self._hash_and_size[1]

    @cached_property
    def _hash_and_size(self) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        for split in SPLITS:
            digest.update(b"\xfe" + split.encode())  # 0xfd, 0xfe and 0xff never occur in UTF-8
            for text, ends_document, answers in self.pieces(split):
                data = text.encode()
                digest.update(data)
                size += len(data)
                if answers is not None:
                    digest.update(b"\xfd" + repr(answers).encode())
                if ends_document:
                    digest.update(b"\xff")
        return digest.hexdigest(), size


@typed
def open_corpus(
    source: str | Path,
    *,
    text_column: str | None = None,
    split: str | None = None,
    data_format: Format | None = None,
    chat: Chat | None = None,
    valid_share: float = 0.05,
    test_share: float = 0.05,
) -> Corpus:
    """Open a text and divide it into train, valid and test, always in the same way.

    Splits that a data set or a directory has are used; a missing split for validation or test is taken from the
    training split. Of 40 or more documents, whole documents go to valid and test, by default every 20th to each. Fewer
    documents are each cut in three at line ends, except for conversations, which stay whole if there are at least
    three.

    Args:
        source: a file of UTF-8 text, JSON, JSON Lines, CSV or Parquet, packed with gzip or zstd or not; a directory of
            such files; `stdlib` (the Python standard library's own source) or `hf:NAME[:CONFIG]`, a data set.
        text_column: for data with fields: the column with the text, or with lists of messages.
        split: for a data set: the single split to use and divide.
        data_format: format of files: "text", "json", "csv" or "parquet"; None detects it by their endings.
        chat: writes conversations as text.
        valid_share: share of the text for validation, if the data has no such split.
        test_share: the same for test.

    Raises:
        InputError: the source does not exist, or is "self", which is not written yet; it has an unexpected format,
            looks like data with fields but is not named like it, or has conversations but `chat` is None; or the
            shares leave nothing for training.

    Warns:
        RunWarning: files of a directory are left out because they have another format or hold no UTF-8 text.
    """
    if not (valid_share >= 0 and test_share >= 0 and valid_share + test_share < 1):
        raise InputError(
            "Shares for valid and test of at least 0 and together less than 1 were expected, "
            f"but got {valid_share} and {test_share}."
        )
    source = str(source)
    if not source:
        raise InputError("A text file, a directory, stdlib or hf:NAME was expected, but got nothing.")
    if source == "self":
        hint = "; the file of that name is ./self" if Path(source).exists() else ""
        raise InputError(
            "A text file, a directory, stdlib or hf:NAME was expected, but got self, which is text that deadhead prune "
            f"has the model write before it prunes the model: there is none to read{hint}."
        )
    is_named = source.startswith("hf:")
    _refuse("split", split if not is_named else None, "data sets, hf:NAME", source)
    _refuse("data_format", data_format if is_named or source == "stdlib" else None, "files", source)
    parts: Mapping[str, _Part]
    if is_named:
        parts = hub_rows(source, text_column=text_column, split=split, chat=chat)
    elif source == "stdlib":
        parts = {"train": stdlib_documents()}
    else:

        def read(files: Mapping[str, Sequence[Found]], kind: Format, path: Path) -> Mapping[str, Rows]:
            return file_rows(files, kind, str(path), text_column=text_column, chat=chat)

        parts = path_parts(Path(source), data_format=data_format, read=read)
    has_rows = isinstance(parts["train"], Rows)
    _refuse("text_column", None if has_rows else text_column, "data with fields (JSON, CSV, Parquet, hf:NAME)", source)
    is_chat = any(isinstance(part, Rows) and part.chat is not None for part in parts.values())
    if len(parts) < len(SPLITS):
        shares = (0 if "valid" in parts else valid_share, 0 if "test" in parts else test_share)
        parts = {**_divided(parts["train"], *shares), **{name: part for name, part in parts.items() if name != "train"}}
    return Corpus(name=source, is_chat=is_chat, readers={name: part.pieces for name, part in parts.items()})


def _refuse(option: str, value: str | None, what: str, source: str) -> None:
    if value is not None:
        raise InputError(f"{option} is for {what}, but got {source}; leave {option} out.")


def _divided(part: _Part, valid_share: float, test_share: float) -> dict[str, _Part]:
    """Divide documents: many as whole documents, without reading them; few by cutting each in three.

    Of few conversations, each split gets at least one.
    """
    if isinstance(part, Rows) and part.chat is not None and len(SPLITS) <= len(part) < _FEW_DOCUMENTS:
        least = 1 / len(part)
        valid_share, test_share = (max(share, least) if share else 0 for share in (valid_share, test_share))
        return {name: part.select(chosen) for name, chosen in _spread(len(part), valid_share, test_share).items()}
    if len(part) >= _FEW_DOCUMENTS:
        return {name: part.select(chosen) for name, chosen in _spread(len(part), valid_share, test_share).items()}
    splits: dict[str, Documents] = {name: Documents() for name in SPLITS}
    for document in part:
        for name, third in zip(SPLITS, document.cut(valid_share, test_share), strict=True):
            if third.stop > third.start:
                splits[name].append(third)
    return dict(splits)


def _spread(count: int, valid_share: float, test_share: float) -> dict[str, np.ndarray]:
    """Return the document indices of each split: held-out documents are spread evenly, and test evenly among them."""
    # In whole numbers, since 0.05 is no binary fraction and the choice must not hang on rounding.
    valid, test = (Fraction(share).limit_denominator(1000) for share in (valid_share, test_share))
    index = np.arange(count, dtype=np.int64)
    held = valid + test
    order = index * held.numerator // held.denominator  # documents held out before this one
    is_held = (index + 1) * held.numerator // held.denominator > order
    part = test / held if held else Fraction(0)
    is_test = is_held & ((order + 1) * part.numerator // part.denominator > order * part.numerator // part.denominator)
    chosen = {"train": ~is_held, "valid": is_held & ~is_test, "test": is_test}
    return {name: np.flatnonzero(mask) for name, mask in chosen.items()}
