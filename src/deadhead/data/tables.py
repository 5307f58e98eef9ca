"""Rows of data with fields: each row of a text column, or each conversation, is a document."""

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
# The column of the tools that a conversation may call.
_TOOLS = "tools"


class Rows:
    """The rows of a data set, each a document; rows that are null or have no message are skipped.

    Args:
        dataset: the data set with the columns.
        columns: one column of strings or of lists of messages, or two: the question and the answer.
        label: name of the data set in errors.
        chat: writes conversations, with the tools of a column named `tools`; None for a column of strings.
        holds: the place of the data set's files, kept as long as the rows are.
    """

    def __init__(
        self, dataset: Dataset, columns: Sequence[str], label: str, chat: Chat | None = None, holds: object = None
    ) -> None:
        tools = [_TOOLS] if chat is not None and _TOOLS in dataset.column_names else []
        self._dataset = dataset.select_columns([*columns, *tools])
        self._columns = list(columns)
        self._read = [*columns, *tools]
        self._label = label
        self._holds = holds
        self.chat = chat

    def __len__(self) -> int:
        return len(self._dataset)

    def pieces(self) -> Iterator[Piece]:
        """Yield the text of all rows; each row ends a document if there are several."""
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
        """Yield a document for each row that is not empty, for data sets of few rows; it is read when it is opened."""
        for row in range(len(self)):
            if size := self._open(row).getbuffer().nbytes:
                yield Document(label=f"row {row} of {self._label}", open=partial(self._open, row), stop=size)

    def _open(self, row: int) -> BytesIO:
        with _decoding(self._label):
            values = [self._dataset[row][name] for name in self._read]
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
            for values in zip(*(batch[name] for name in self._read), strict=True):
                if (written := self._write(row, values)) is not None:
                    yield written
                row += 1

    def _write(self, row: int, values: Sequence[Any]) -> Written | None:
        values = [
            _without_fillers(value, self._dataset.features[name])
            for name, value in zip(self._read, values, strict=True)
        ]
        said, tools = values[: len(self._columns)], values[len(self._columns) :]
        if not all(value or value == "" for value in said):
            return None
        if self.chat is None:
            return Written(said[0], None)
        messages: list[Any] = []
        for role, value in zip(("user", "assistant"), said, strict=False):
            part = {"role": role, "content": value} if isinstance(value, str) and len(said) > 1 else value
            messages += part if isinstance(part, list) else [part]
        return self.chat.write(messages, f"row {row} of {self._label}", *tools)


def rows_of(
    dataset: Dataset,
    source: str,
    *,
    text_column: str | None,
    chat: Chat | None,
    holds: object = None,
    is_csv: bool = False,
) -> Rows:
    """Find the columns to read of a data set, which errors call `source`.

    If no column is named, these are text, messages, prompt and completion, or the only column of strings. For a CSV
    file the only column is not used, because its first line may not hold names.

    Raises:
        InputError: there is no such column, or there are conversations but no chat template.
    """
    kinds = {name: _kind(dataset, name) for name in dataset.column_names}
    columns = _columns(kinds, is_csv=is_csv) if text_column is None else [text_column]
    others = ", ".join(name for name in dataset.column_names if name not in columns)[:80]
    name_one = "name one with text_column (--text-column)"
    if is_csv and not columns:
        raise InputError(
            f"A column named text was expected in {source}, but its first line names {others}; {name_one}, or, if that "
            "line holds data, put a line of names before it."
        )
    if not columns or columns[0] not in kinds:
        what = "A column of strings (text, or the only one) or of messages (messages, or prompt and completion)"
        if text_column is not None:
            what = f"A column of strings or of messages named {text_column[:40]}"
        raise InputError(f"{what} was expected in {source}, but its columns are {others or 'none'}; {name_one}.")
    if not all(kinds[name] for name in columns):
        raise InputError(
            f"Strings or lists of messages were expected in column {columns[0]} of {source}, but it holds "
            f"{_held(dataset.features[columns[0]])}; make them strings{others and f', or {name_one} of {others}'}."
        )
    if kinds[columns[0]] == "string" and len(columns) == 1:
        return Rows(dataset, columns, source, None, holds)
    if chat is None:
        raise InputError(
            f"{source} holds conversations ({', '.join(columns)}), but the tokenizer has no chat template; give one "
            "with chat_template (--chat-template FILE), or name a column of text with text_column."
        )
    return Rows(dataset, columns, source, chat, holds)


def _columns(kinds: Mapping[str, str], *, is_csv: bool) -> list[str]:
    """Return the columns to read if none is named; columns with an expected name come first."""
    usual = {"text": "string", "messages": "list"}
    if found := [name for name, kind in usual.items() if kinds.get(name) == kind]:
        return found[:1]
    if kinds.get("prompt") and kinds.get("completion"):
        return ["prompt", "completion"]
    if found := [name for name in usual if name in kinds]:
        return found[:1]
    strings = [name for name, kind in kinds.items() if kind == "string"]
    return strings if len(strings) == 1 and not is_csv else []


def _kind(dataset: Dataset, name: str) -> str:
    """Return "string", "list" or nothing."""
    feature = dataset.features[name]
    if getattr(feature, "dtype", "") in _STRINGS:
        return "string"
    if type(feature).__name__ == "Json":
        # Whatever JSON can be: the first rows tell.
        values = [value for value in dataset[:_ROWS_READ_AT_ONCE][name] if value is not None]
        return "list" if values and all(isinstance(value, (list, dict)) for value in values) else ""
    # Lists of structs, under the several names that versions of the library have for them.
    is_list = isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence")
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return "list" if is_list and type(inner).__name__ != "Value" else ""


def _without_fillers(value: Any, feature: Any) -> Any:
    """Return a value without the nulls of fields that only other rows of the table have; JSON's own nulls stay."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without_fillers(item, inner) for item in value]
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: _without_fillers(item, feature[name]) for name, item in value.items() if item is not None}
    return value


def _held(feature: Any) -> str:
    """Return a description of the contents of a column whose values cannot be read."""
    name, dtype = type(feature).__name__, getattr(feature, "dtype", "")
    if name == "Value":
        return "nothing but nulls" if dtype == "null" else f"values of type {dtype}"
    return {"Json": "values of several types", "dict": "objects"}.get(name, "lists of something else")


def file_rows(
    files: Mapping[str, Sequence[Found]], kind: Format, source: str, *, text_column: str | None, chat: Chat | None
) -> dict[str, Rows]:
    """Read files of one format, grouped by split; errors call them `source`. See `rows_of`.

    Raises:
        InputError: `datasets` is not installed, or cannot read a file, or see `rows_of`.
    """
    require_extra("data", "datasets", what=f"Reading {source} by its fields")
    from datasets import load_dataset

    everything = [file for part in files.values() for file in part]
    settings: dict[str, Any] = {}
    names = {split: [glob.escape(str(file.path)) for file in part] for split, part in files.items()}
    # What was unpacked is gone with its place, and so are the tables made of it.
    place = next((file.place for file in everything if file.place is not None), None)
    cache = None if place is None else str(place.folder / "cache")
    try:
        if kind == "csv":
            settings = _csv_settings(everything[0].path)
        with _silent(), warnings.catch_warnings():
            # Said where pandas leaves out what is too much in a line.
            warnings.filterwarnings("error", message="Length of header or names does not match")
            loaded = load_dataset(kind, data_files=names, cache_dir=cache, **settings)
    except Exception as error:  # the library raises many kinds, down to those of the file formats
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError) or "in UTF-8" in str(cause):
            raise InputError(
                f"UTF-8 text was expected in {source}, but it has another encoding; convert it to UTF-8."
            ) from error
        reason = first_line(cause)[:100]
        reason = "it has no rows" if "corresponds to no data" in reason else reason
        raise InputError(
            f"{kind.upper()} was expected in {source}, but it could not be read: {reason}; repair it, or read it as "
            "plain text with data_format text."
        ) from error
    rows = {
        split: rows_of(part, source, text_column=text_column, chat=chat, holds=place, is_csv=kind == "csv")
        for split, part in loaded.items()
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


def _csv_settings(path: Path) -> dict[str, Any]:
    """Return the settings to read a CSV file with, by its first line; values such as None or 01 are read as text."""
    import pandas  # type: ignore[import-untyped]
    from datasets import Features, Value

    with path.open("rb") as file:
        header = next((line for line in iter(partial(file.readline, PROBE_BYTES), b"") if line.strip()), b"")
    line = header.decode("utf-8", "replace")
    separator = max("\t;,|" if path.suffix.lower() == ".tsv" else ",;\t|", key=line.count)
    # What is too much in a line is no index.
    how = {"sep": separator, "index_col": False, "skipinitialspace": f"{separator} " in line}
    names = pandas.read_csv(path, nrows=0, **how).columns
    return {**how, "keep_default_na": False, "features": Features({str(name): Value("string") for name in names})}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep `datasets` from writing bars and log lines, and from reporting to a server that a local file is read."""
    import datasets

    level, has_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    is_offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = is_offline
        datasets.logging.set_verbosity(level)
        if has_bars:
            datasets.enable_progress_bars()


def require_text(rows: Mapping[str, Rows], source: str) -> None:
    """Check that every split has text."""
    for split, part in rows.items():
        if not any(piece.text for piece in part.pieces()):
            raise InputError(f"Text was expected in {source}, but its split {split} has none; choose another split.")
