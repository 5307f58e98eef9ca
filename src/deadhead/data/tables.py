"""Rows of data with fields: those of a data set's text column, or of its conversations, each a document."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deadhead.data.chat import Chat, Written
from deadhead.data.formats import PROBE_BYTES, Format, Found
from deadhead.data.pieces import PIECE_BYTES, Document, Piece
from deadhead.errors import InputError, first_line, require_extra

if TYPE_CHECKING:  # importing it takes seconds, and most texts don't need it
    from datasets import Dataset  # type: ignore[import-untyped]

_ROWS_READ_AT_ONCE = 256
_STRINGS = ("string", "large_string")


class Rows:
    """The rows of a data set, each a document; those that are null, or have no message, are passed over.

    Args:
        dataset: with the columns.
        columns: one of strings or of lists of messages, or two: what is asked and what is answered.
        label: what errors call the data set.
        chat: writes conversations; None where the column is of strings.
        holds: what the data set's files lie in, kept as long as the rows are.
    """

    def __init__(
        self, dataset: Dataset, columns: Sequence[str], label: str, chat: Chat | None = None, holds: object = None
    ) -> None:
        self._dataset = dataset.select_columns(list(columns))
        self._columns = list(columns)
        self._label = label
        self._holds = holds
        self.chat = chat

    def __len__(self) -> int:
        return len(self._dataset)

    def pieces(self) -> Iterator[Piece]:
        """Yield the text of all rows; each row ends a document if there is more than one."""
        separated = len(self) > 1
        for text, answers in self._written():
            if self.chat is not None or 4 * len(text) <= PIECE_BYTES:
                yield Piece(text, separated, answers)
            else:
                data = text.encode()
                document = Document(label=self._label, open=partial(BytesIO, data), stop=len(data))
                yield from document.pieces(separated=separated)

    def select(self, indices: np.ndarray) -> Rows:
        """The rows of these indices."""
        return Rows(self._dataset.select(indices), self._columns, self._label, self.chat, self._holds)

    def __iter__(self) -> Iterator[Document]:
        """One document a row that is not empty, for data sets of few rows: each is read when it is opened."""
        for row in range(len(self)):
            if size := self._open(row).getbuffer().nbytes:
                yield Document(label=f"row {row} of {self._label}", open=partial(self._open, row), stop=size)

    def _open(self, row: int) -> BytesIO:
        with _decoding(self._label):
            values = [self._dataset[row][name] for name in self._columns]
        written = self._write(row, values)
        return BytesIO(written.text.encode() if written else b"")

    def _written(self) -> Iterator[Written]:
        row = 0
        batches = self._dataset.with_format(None).iter(_ROWS_READ_AT_ONCE)
        while True:
            with _decoding(self._label):
                batch = next(batches, None)
            if batch is None:
                return
            for values in zip(*(batch[name] for name in self._columns), strict=True):
                if (written := self._write(row, values)) is not None:
                    yield written
                row += 1

    def _write(self, row: int, values: Sequence[Any]) -> Written | None:
        if not all(value or value == "" for value in values):
            return None
        if self.chat is None:
            return Written(values[0], None)
        messages: list[Any] = []
        for role, value in zip(("user", "assistant"), values, strict=False):
            said = {"role": role, "content": value} if isinstance(value, str) and len(values) > 1 else value
            messages += said if isinstance(said, list) else [said]
        return self.chat.write(messages, f"row {row} of {self._label}")


def rows_of(dataset: Dataset, source: str, *, text_column: str | None, chat: Chat | None, holds: object = None) -> Rows:
    """Find what to read of a data set, which errors call `source`.

    Without a column's name it is text, messages, prompt and completion, or the only one of strings.

    Raises:
        InputError: there is no such column, or conversations came without a chat template.
    """
    kinds = {name: _kind(feature) for name, feature in dataset.features.items()}
    strings = [name for name, kind in kinds.items() if kind == "string"]
    columns = [text_column] if text_column is not None else []
    if text_column is None:
        chats = [["messages"]] if kinds.get("messages") == "list" else []
        chats += [["prompt", "completion"]] if all(kinds.get(name) for name in ("prompt", "completion")) else []
        only = [strings] if len(strings) == 1 else []
        columns = next(iter([*([["text"]] if "text" in strings else []), *chats, *only]), [])
    if not columns or not all(kinds.get(name) for name in columns):
        what = "A column of strings (text, or the only one) or of messages (messages, or prompt and completion)"
        if text_column is not None:
            what = f"A column of strings or of messages named {text_column}"
        there = ", ".join(dataset.column_names)[:80] or "none"
        raise InputError(f"{what} was expected in {source}, but its columns are {there}; name one with text_column.")
    if kinds[columns[0]] == "string" and len(columns) == 1:
        return Rows(dataset, columns, source, None, holds)
    if chat is None:
        raise InputError(
            f"{source} holds conversations ({', '.join(columns)}), but the tokenizer has no chat template; give one "
            "with chat_template (--chat-template FILE), or name a column of text with text_column."
        )
    return Rows(dataset, columns, source, chat, holds)


def _kind(feature: Any) -> str:
    """Return "string", "list" or nothing."""
    if getattr(feature, "dtype", "") in _STRINGS:
        return "string"
    # Lists of structs, under the several names that versions of the library have for them.
    is_list = isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence", "Json")
    return "list" if is_list else ""


def file_rows(
    files: Mapping[str, Sequence[Found]], kind: Format, source: str, *, text_column: str | None, chat: Chat | None
) -> dict[str, Rows]:
    """Read files of one kind by the split that each belongs to; errors call them `source`. See `rows_of`.

    Raises:
        InputError: `datasets` is not installed, or cannot read a file, or see `rows_of`.
    """
    require_extra("data", "datasets", what=f"Reading {source} by its fields")
    from datasets import load_dataset

    everything = [file for part in files.values() for file in part]
    settings: dict[str, Any] = {}
    if kind == "csv":
        # A word such as "None" is text, and what is too much in a line is no index.
        settings = {"sep": _separator(everything[0].path), "keep_default_na": False, "index_col": False}
    names = {split: [glob.escape(str(file.path)) for file in part] for split, part in files.items()}
    # What was unpacked is gone with its place, and so are the tables made of it.
    place = next((file.place for file in everything if file.place is not None), None)
    cache = None if place is None else str(place.folder / "cache")
    try:
        with _silent(), warnings.catch_warnings():
            # Said where pandas leaves out what is too much in a line.
            warnings.filterwarnings("error", message="Length of header or names does not match")
            loaded = load_dataset(kind, data_files=names, cache_dir=cache, **settings)
    except Exception as error:  # the library raises many kinds, down to those of the file formats
        reason = first_line(error.__cause__ or error)[:100]
        reason = "it has no rows" if "corresponds to no data" in reason else reason
        raise InputError(
            f"{kind.upper()} was expected in {source}, but it could not be read: {reason}; mend it, or read it as it "
            "stands with data_format text."
        ) from error
    rows = {
        split: rows_of(part, source, text_column=text_column, chat=chat, holds=place) for split, part in loaded.items()
    }
    require_text(rows, source)
    return rows


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"UTF-8 text was expected in {label}, but {error.object[:20]!r} cannot be decoded; convert it to UTF-8."
        ) from None


def _separator(path: Path) -> str:
    """Return what parts the columns of a CSV file, by its first line."""
    with path.open("rb") as file:
        header = file.readline(PROBE_BYTES).decode("utf-8", "replace")
    return max("\t;,|" if path.suffix.lower() == ".tsv" else ",;\t|", key=header.count)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep `datasets` from writing bars and log lines: what is wrong is told in one sentence."""
    import datasets

    level, has_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if has_bars:
            datasets.enable_progress_bars()


def require_text(rows: Mapping[str, Rows], source: str) -> None:
    """Check that no split is without text."""
    for split, part in rows.items():
        if not any(piece.text for piece in part.pieces()):
            raise InputError(f"Text was expected in {source}, but its split {split} has none; choose another split.")
