"""Text as a stream of pieces: documents are read in bounded memory and cut where a cut does no harm.

A document is a range of bytes of a UTF-8 file (or of a string in memory). It is read as pieces of at most
`PIECE_BYTES` whose concatenation is the document's text, unchanged. All cuts are made on bytes.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from deadhead.errors import InputError

PIECE_BYTES = 1 << 18
_SCAN_BYTES = 1 << 16
# What follows the first byte of a character in UTF-8.
_CONTINUATION = bytes(range(0x80, 0xC0))


@contextmanager
def readable(label: str | Path) -> Iterator[None]:
    """Turn an error that keeps a text from being read into an InputError of one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"Text was expected in {label}, but it cannot be read: {error.strerror}.") from error


class Piece(NamedTuple):
    """At most `PIECE_BYTES` of text, and whether it ends one of several documents and is followed by a separator.

    A conversation of any length is one piece; its `answers` are the character ranges of the answers, if they were asked
    for.
    """

    text: str
    ends_document: bool
    answers: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """The bytes from `start` up to `stop` of what `open` opens; `label` is its name in errors."""

    label: str
    open: Callable[[], BinaryIO]
    start: int = 0
    stop: int

    def pieces(self, *, separated: bool = False) -> Iterator[Piece]:
        """Yield the text in pieces; if the document is to be `separated` from others, the last piece is marked.

        Raises:
            InputError: the bytes cannot be read, or are not UTF-8 (the message gives the offset).
        """
        position = self.start
        with readable(self.label), self.open() as stream:
            while position < self.stop:
                stream.seek(position)
                wanted = min(PIECE_BYTES, self.stop - position)
                block = stream.read(wanted)
                if not block:
                    return
                is_last = len(block) < wanted or position + wanted == self.stop
                if not is_last:
                    # Up to the last line end, or, where there is none, to the beginning of the last character.
                    block = block[: block.rfind(b"\n") + 1 or -1]
                try:
                    text, size = utf_8_decode(block, "strict", is_last)
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"UTF-8 text was expected in {self.label}, but byte {position + error.start} cannot be "
                        "decoded; convert the text to UTF-8."
                    ) from None
                position += size
                yield Piece(text, separated and position == self.stop)

    def cut(self, valid_share: float, test_share: float) -> tuple[Document, Document, Document]:
        """Cut the document into three contiguous ones, for training, validation and test."""
        length = self.stop - self.start
        with readable(self.label), self.open() as stream:
            valid_target = self._character_at(stream, self.stop - int(length * (valid_share + test_share)))
            test_target = self._character_at(stream, self.stop - int(length * test_share))
            if valid_target == test_target:
                valid = test = self._cut_near(stream, test_target, first=self.start, last=self.stop)
            else:
                valid = self._cut_near(stream, valid_target, first=self.start, last=test_target)
                test = self._cut_near(stream, test_target, first=valid, last=self.stop)
        return replace(self, stop=valid), replace(self, start=valid, stop=test), replace(self, start=test)

    def _cut_near(self, stream: BinaryIO, target: int, *, first: int, last: int) -> int:
        """Return where to cut: the first line end from `target` on, the last one before it, or the target itself.

        Line ends count between `first` and `last`, but not at these positions, where a part would be empty. If the
        target is the document's beginning or end, an empty part is intended.
        """
        if target in (self.start, self.stop):
            return target
        position = max(target - 1, first)  # the cut is after the line end
        stream.seek(position)
        while position < last and (block := stream.readline(_SCAN_BYTES)):
            position += len(block)
            if block.endswith(b"\n") and position < last:
                return position
        low = max(first, target - _SCAN_BYTES)
        stream.seek(low)
        found = stream.read(target - low).rfind(b"\n")
        return low + found + 1 if found >= 0 else target

    def _character_at(self, stream: BinaryIO, position: int) -> int:
        """Return the beginning of the first character at or after `position`."""
        stream.seek(position)
        data = stream.read(min(4, self.stop - position))
        return position + len(data) - len(data.lstrip(_CONTINUATION))


class Documents(list[Document]):
    """Several documents, which are separated from each other."""

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of all documents."""
        for document in self:
            yield from document.pieces(separated=len(self) > 1)

    def select(self, indices: Iterable[int]) -> Documents:
        """The documents of these indices."""
        return Documents(self[index] for index in indices)


def whole_words(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the same text, cut so that no word (a run of characters without whitespace) is split between pieces."""
    held: list[str] = []
    for text, ends_document, _ in pieces:
        words = text.rsplit(None, 1)
        goes_on = not ends_document and words and text.endswith(words[-1])
        cut = len(text) - len(words[-1]) if goes_on else len(text)
        if cut or ends_document:
            yield Piece("".join([*held, text[:cut]]), ends_document)
            held = [text[cut:]]
        else:
            held.append(text)
    if any(held):
        yield Piece("".join(held), False)
