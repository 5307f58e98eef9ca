"""Text as a stream of pieces: documents read in bounded memory, cut where a cut does no harm.

A document is a range of bytes of a UTF-8 file (or of a string in memory). It is read as pieces of at most
`PIECE_BYTES` whose concatenation is the document's text, unchanged. All cuts are made on bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import BinaryIO, NamedTuple

from deadhead.errors import InputError

PIECE_BYTES = 1 << 18
_SCAN_BYTES = 1 << 16


class Piece(NamedTuple):
    """At most `PIECE_BYTES` of text, and whether it ends one of several documents, so that a separator follows."""

    text: str
    ends_document: bool


@dataclass(frozen=True, kw_only=True)
class Document:
    """The bytes from `start` up to `stop` of something that `open` opens; `label` is what errors call it."""

    label: str
    open: Callable[[], BinaryIO]
    start: int = 0
    stop: int

    def texts(self) -> Iterator[str]:
        """Yield the text in pieces.

        Raises:
            InputError: the bytes can't be read, or are not UTF-8 (the message gives the offset).
        """
        position = self.start
        with self.open() as stream:
            while position < self.stop:
                try:
                    stream.seek(position)
                    block = stream.read(min(PIECE_BYTES, self.stop - position))
                except OSError as error:
                    raise InputError(
                        f"Text was expected in {self.label}, but it cannot be read: {error.strerror}."
                    ) from error
                if not block:
                    return
                if position + len(block) < self.stop:
                    block = block[: _last_cut(block)]
                try:
                    text = block.decode()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"UTF-8 text was expected in {self.label}, but byte {position + error.start} cannot be "
                        "decoded; convert the text to UTF-8."
                    ) from None
                yield text
                position += len(block)

    def cut(self, valid_share: float, test_share: float) -> tuple[Document, Document, Document]:
        """Cut in three contiguous documents, for training, validation and test."""
        length = self.stop - self.start
        with self.open() as stream:
            valid_target = self._character_at(stream, self.stop - int(length * (valid_share + test_share)))
            test_target = self._character_at(stream, self.stop - int(length * test_share))
            if valid_target == test_target:
                valid = test = self._cut_near(stream, test_target, first=self.start, last=self.stop)
            else:
                valid = self._cut_near(stream, valid_target, first=self.start, last=test_target)
                test = self._cut_near(stream, test_target, first=valid, last=self.stop)
        return (
            replace(self, stop=valid),
            replace(self, start=valid, stop=test),
            replace(self, start=test),
        )

    def _cut_near(self, stream: BinaryIO, target: int, *, first: int, last: int) -> int:
        """Where to cut: the first line end from `target` on, or the last one before it, or at the target itself.

        Line ends count between `first` and `last`, but not at these, where a part would be empty. Where the target is
        the document's beginning or end, an empty part is what is wanted.
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
        """The beginning of a character at `position` or after."""
        stream.seek(position)
        data = stream.read(min(4, self.stop - position))
        return position + next((skipped for skipped, byte in enumerate(data) if not _is_continuation(byte)), len(data))


def text_document(label: str, text: str) -> Document:
    """A document of a text in memory."""
    data = text.encode()
    return Document(label=label, open=lambda: BytesIO(data), stop=len(data))


def document_pieces(documents: Iterable[Document], *, separated: bool) -> Iterator[Piece]:
    """Yield the pieces of several documents; the last of each says that it ends one if they are to be `separated`."""
    for document in documents:
        position = document.start
        for text in document.texts():
            position += len(text.encode())
            yield Piece(text, separated and position == document.stop)


def whole_words(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the same text cut so that no word, no run of characters without whitespace, lies in two pieces."""
    held: list[str] = []
    for text, ends_document in pieces:
        words = text.rsplit(None, 1)
        cut = len(text) - len(words[-1]) if words and text.endswith(words[-1]) else len(text)
        if ends_document:
            yield Piece("".join([*held, text]), True)
            held = []
        elif cut == 0:
            held.append(text)
        else:
            yield Piece("".join([*held, text[:cut]]), False)
            held = [text[cut:]]
    if any(held):
        yield Piece("".join(held), False)


def _last_cut(block: bytes) -> int:
    """The last line end in a block, or, where there is none, the beginning of its last character."""
    cut = block.rfind(b"\n") + 1
    if cut:
        return cut
    cut = len(block) - 1
    while cut > max(len(block) - 4, 0) and _is_continuation(block[cut]):
        cut -= 1
    # A cut of 0 would never end: such a block is shorter than one character, or is not UTF-8, which decoding reports.
    return cut or len(block)


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80
