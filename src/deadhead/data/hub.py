"""Text from a data set of the Hugging Face hub, or of a local folder that the `datasets` library can read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import constants

from deadhead.data.local import SPLIT_NAMES
from deadhead.data.pieces import PIECE_BYTES, Document, Piece
from deadhead.disk.hub import quick, require_had
from deadhead.errors import InputError, first_line, require_extra

if TYPE_CHECKING:  # importing it takes seconds, and most texts don't need it
    from datasets import Dataset  # type: ignore[import-untyped]

_ROWS_READ_AT_ONCE = 256


class Rows:
    """The rows of a data set's column of strings, each a document; those that are null are passed over."""

    def __init__(self, dataset: Dataset, column: str, label: str) -> None:
        self._dataset = dataset.select_columns([column])
        self._column = column
        self._label = label

    def __len__(self) -> int:
        return len(self._dataset)

    def pieces(self) -> Iterator[Piece]:
        """Yield the text of all rows; each row ends a document if there is more than one."""
        separated = len(self) > 1
        for batch in self._dataset.with_format("arrow").iter(_ROWS_READ_AT_ONCE):
            for text in batch.column(self._column).to_pylist():
                if text is None:
                    continue
                if 4 * len(text) <= PIECE_BYTES:
                    yield Piece(text, separated)
                else:
                    data = text.encode()
                    document = Document(label=self._label, open=partial(BytesIO, data), stop=len(data))
                    yield from document.pieces(separated=separated)

    def select(self, indices: np.ndarray) -> Rows:
        """The rows of these indices."""
        return Rows(self._dataset.select(indices), self._column, self._label)

    def __iter__(self) -> Iterator[Document]:
        """One document a row that is not empty, for data sets of few rows: each is read when it is opened."""
        for row in range(len(self)):
            if size := self._open(row).getbuffer().nbytes:
                yield Document(label=f"row {row} of {self._label}", open=partial(self._open, row), stop=size)

    def _open(self, row: int) -> BytesIO:
        return BytesIO((self._dataset[row][self._column] or "").encode())


def hub_rows(source: str, *, column: str | None, split: str | None) -> dict[str, Rows]:
    """Load a data set: the splits it has, or else the rows that are to be divided as "train". Its code is never run.

    NAME in `hf:NAME[:CONFIG]` may be a local folder. Without a column it takes "text", or the only one of strings.
    """
    require_extra("data", "datasets", what=source)
    name, _, config = source.removeprefix("hf:").partition(":")
    if not name or ":" in config or source.endswith(":"):
        raise InputError(f"hf:NAME or hf:NAME:CONFIG was expected, but {source!r} came.")
    require_had(name, kind="dataset")
    loaded = _load(source, name, config or None)
    names = ", ".join(sorted(loaded))
    if split is not None:
        if split not in loaded:
            raise InputError(f"A split of {source} was expected ({names}), but {split!r} came.")
        own = {"train": loaded[split]}
    else:
        # The first name that is there counts, so it is written last.
        own = {
            ours: loaded[name] for ours, theirs in SPLIT_NAMES.items() for name in reversed(theirs) if name in loaded
        }
        if "train" not in own:
            if len(loaded) > 1:
                raise InputError(
                    f"A split named train was expected in {source}, but it has {names}; choose one with split."
                )
            own = {"train": next(iter(loaded.values()))}
    rows = {ours: Rows(dataset, _text_column(dataset, column, source), source) for ours, dataset in own.items()}
    for ours, part in rows.items():
        if not any(piece.text for piece in part.pieces()):
            raise InputError(f"Text was expected in {source}, but its split {ours} has none; choose another split.")
    return rows


def _load(source: str, name: str, config: str | None) -> dict[str, Dataset]:
    """All splits of a data set by name."""
    import datasets
    from datasets import Dataset, load_dataset, load_from_disk

    # It read this setting of huggingface_hub's when it was imported.
    before = datasets.config.HF_HUB_OFFLINE
    is_saved = any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    try:
        with quick():
            datasets.config.HF_HUB_OFFLINE = before or constants.HF_HUB_OFFLINE
            loaded = load_from_disk(name) if is_saved else load_dataset(name, config)
    except Exception as error:  # the library raises many kinds, down to those of the file formats
        raise InputError(f"The data set {source} could not be loaded: {first_line(error)}.") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)


def _text_column(dataset: Dataset, column: str | None, source: str) -> str:
    """The column with the text."""
    kinds = {name: getattr(feature, "dtype", "") for name, feature in dataset.features.items()}
    strings: list[str] = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if column is None:
        found = "text" if "text" in strings or len(strings) != 1 else strings[0]
        what = "A column named text, or only one of strings, was expected"
    else:
        found, what = column, f"A column of strings named {column} was expected"
    if found in strings:
        return found
    columns = ", ".join(dataset.column_names) or "none"
    raise InputError(f"{what} in {source}, but its columns are {columns}; name one that holds strings with column.")
