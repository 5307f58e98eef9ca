"""A corpus: text for training, validation and test, read as a stream from a file, a directory or a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from deadhead.data.hub import Rows, hub_rows
from deadhead.data.local import path_documents, stdlib_documents
from deadhead.data.pieces import Documents, Piece
from deadhead.errors import InputError

SPLITS = ("train", "valid", "test")
_FEW_DOCUMENTS = 40
_Part = Rows | Documents


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text in three splits, never held in memory as a whole: for each a reader, which opens it as a stream of pieces.

    The name is what the user wrote: "stdlib", a path, "hf:...".
    """

    name: str
    readers: Mapping[str, Callable[[], Iterator[Piece]]] = field(repr=False)

    def pieces(self, split: str) -> Iterator[Piece]:
        """Yield the text of a split, piece by piece.

        Raises:
            InputError: there is no such split, or the text can't be read.
        """
        if split not in self.readers:
            raise InputError(f"A split was expected ({', '.join(SPLITS)}), but {split!r} came.")
        return self.readers[split]()

    def documents(self, split: str) -> Iterator[str]:
        """Yield the text of a split, as `pieces` does: documents, or pieces of at most 256 KiB of longer ones."""
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
    one for training. Of 40 documents or more, whole ones go to valid and test, every 20th each by default; fewer are
    each cut in three, at line ends.

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
    parts: Mapping[str, _Part]
    if source.startswith("hf:"):
        parts = hub_rows(source, column=column, split=split)
    else:
        for option, value in (("column", column), ("split", split)):
            if value is not None:
                raise InputError(f"{option} is for data sets, hf:NAME, but {source} came; leave {option} out.")
        parts = {"train": stdlib_documents()} if source == "stdlib" else path_documents(Path(source))
    if len(parts) < len(SPLITS):
        shares = (0 if "valid" in parts else valid_share, 0 if "test" in parts else test_share)
        parts = {**_divided(parts["train"], *shares), **{name: part for name, part in parts.items() if name != "train"}}
    return Corpus(name=source, readers={name: part.pieces for name, part in parts.items()})


def _divided(part: _Part, valid_share: float, test_share: float) -> dict[str, _Part]:
    """Divide documents: whole ones, without reading them, if there are many, else each of them in three."""
    if len(part) >= _FEW_DOCUMENTS:
        return {name: part.select(chosen) for name, chosen in _spread(len(part), valid_share, test_share).items()}
    splits: dict[str, Documents] = {name: Documents() for name in SPLITS}
    for document in part:
        for name, third in zip(SPLITS, document.cut(valid_share, test_share), strict=True):
            if third.stop > third.start:
                splits[name].append(third)
    return dict(splits)


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
