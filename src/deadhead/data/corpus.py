"""A corpus: text for training, validation and test, read as a stream from a file, a directory or a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from deadhead.data.hub import Rows, hub_rows
from deadhead.data.local import path_documents, stdlib_documents
from deadhead.data.pieces import Document, Piece, document_pieces
from deadhead.errors import InputError

SPLITS = ("train", "valid", "test")
_FEW_DOCUMENTS = 40


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text in three splits, never held in memory as a whole.

    Attributes:
        name: what the user wrote: "stdlib", a path, "hf:...".
        readers: for each split, opens its text anew as a stream of pieces.
    """

    name: str
    readers: Mapping[str, Callable[[], Iterator[Piece]]] = field(repr=False)

    def pieces(self, split: str) -> Iterator[Piece]:
        """Yield the text of a split, piece by piece, each saying whether it ends one of several documents.

        Raises:
            InputError: there is no such split, or the text can't be read.
        """
        if split not in self.readers:
            raise InputError(f"A split was expected ({', '.join(SPLITS)}), but {split!r} came.")
        return self.readers[split]()

    def documents(self, split: str) -> Iterator[str]:
        """Yield the text of a split: a document, or successive pieces of at most 256 KiB of a longer one.

        Raises:
            InputError: there is no such split, or the text can't be read.
        """
        return (piece.text for piece in self.pieces(split))

    def sha256(self) -> str:
        """The hash of all text in order, including where splits and documents end."""
        return self._hash_and_size[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all text in UTF-8."""
        return self._hash_and_size[1]

    @cached_property
    def _hash_and_size(self) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        for split in SPLITS:
            digest.update(b"\xfe" + split.encode())  # 0xfe and 0xff never occur in UTF-8
            for text, ends_document in self.pieces(split):
                data = text.encode()
                digest.update(data)
                size += len(data)
                if ends_document:
                    digest.update(b"\xff")
        return digest.hexdigest(), size


def open_corpus(
    source: str,
    *,
    column: str | None = None,
    split: str | None = None,
    valid_share: float = 0.05,
    test_share: float = 0.05,
) -> Corpus:
    """Open a text and divide it in train, valid and test, always in the same way.

    Splits that a data set or a directory has are used; one for validation or test that is missing is taken from the
    one for training. Otherwise, of 40 documents or more, every so many go to valid and test as a whole (every 20th
    each by default); fewer documents are each cut in three, at line ends.

    Args:
        source: a UTF-8 file, a directory of such files, `stdlib` (the Python standard library's own source) or
            `hf:NAME[:CONFIG]`, a data set.
        column: of a data set: the column with the text.
        split: of a data set: the one split to take and divide.
        valid_share: share of the text for validation where it has no such split.
        test_share: the same for test.

    Raises:
        InputError: the source is not there, or not text, or the shares leave nothing for training.
    """
    if not (valid_share >= 0 and test_share >= 0 and valid_share + test_share < 1):
        raise InputError(
            "Shares for valid and test of at least 0 and together less than 1 were expected, "
            f"but {valid_share} and {test_share} came."
        )
    if not source:
        raise InputError("A text file, a directory, stdlib or hf:NAME was expected, but nothing came.")
    if source.startswith("hf:"):
        own_rows, rows = hub_rows(source, column=column, split=split)
        if rows is not None:
            return Corpus(name=source, readers=_divided_rows(rows, valid_share, test_share))
        missing = [name for name in SPLITS if name not in own_rows]
        shares = (valid_share if "valid" in missing else 0, test_share if "test" in missing else 0)
        readers = _divided_rows(own_rows["train"], *shares) if missing else {}
        readers.update({name: part.pieces for name, part in own_rows.items() if name != "train" or not missing})
        return Corpus(name=source, readers=readers)
    for option, value in (("column", column), ("split", split)):
        if value is not None:
            raise InputError(f"{option} is for data sets, hf:NAME, but {source} came; leave {option} out.")
    own, documents = ({}, stdlib_documents()) if source == "stdlib" else path_documents(Path(source))
    if own:
        shares = (0 if "valid" in own else valid_share, 0 if "test" in own else test_share)
        own = {**_divided(own["train"], *shares), **{name: part for name, part in own.items() if name != "train"}}
    return Corpus(name=source, readers=_document_readers(own or _divided(documents, valid_share, test_share)))


def _document_readers(splits: Mapping[str, Sequence[Document]]) -> dict[str, Callable[[], Iterator[Piece]]]:
    return {
        name: partial(document_pieces, documents, separated=len(documents) > 1) for name, documents in splits.items()
    }


def _divided(documents: Sequence[Document], valid_share: float, test_share: float) -> dict[str, list[Document]]:
    """Divide documents: whole ones if there are many, else each of them in three."""
    if len(documents) >= _FEW_DOCUMENTS:
        indices = _spread(len(documents), valid_share, test_share)
        return {name: [documents[index] for index in chosen] for name, chosen in indices.items()}
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        for name, part in zip(SPLITS, document.cut(valid_share, test_share), strict=True):
            if part.end > part.start:
                splits[name].append(part)
    return splits


def _divided_rows(rows: Rows, valid_share: float, test_share: float) -> dict[str, Callable[[], Iterator[Piece]]]:
    """Divide the rows of a data set in the same way, without reading them where they are many."""
    if len(rows) < _FEW_DOCUMENTS:
        return _document_readers(_divided(rows.documents(), valid_share, test_share))
    indices = _spread(len(rows), valid_share, test_share)
    return {name: rows.select(chosen).pieces for name, chosen in indices.items()}


def _spread(count: int, valid_share: float, test_share: float) -> dict[str, np.ndarray]:
    """The indices of the documents of each split: those held out lie evenly, and so do those for test among them."""
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
