"""Text from a data set of the Hugging Face hub, or of a local folder that the `datasets` library can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from deadhead.data.chat import Chat
from deadhead.data.local import SPLIT_NAMES
from deadhead.data.tables import Rows, require_text, rows_of
from deadhead.disk.hub import quick, require_had
from deadhead.disk.places import checked_path
from deadhead.errors import InputError, first_line, require_extra

if TYPE_CHECKING:  # importing it takes seconds, and most texts don't need it
    from datasets import Dataset  # type: ignore[import-untyped]


def hub_rows(source: str, *, text_column: str | None, split: str | None, chat: Chat | None) -> dict[str, Rows]:
    """Load the splits of a data set; without splits, all rows are returned as "train". Its code is never run.

    NAME in `hf:NAME[:CONFIG]` may be a local folder. See `rows_of` for the columns.
    """
    require_extra("data", "datasets", what=source)
    name, _, config = source.removeprefix("hf:").partition(":")
    if not name or ":" in config or source.endswith(":"):
        raise InputError(f"hf:NAME or hf:NAME:CONFIG was expected, but got {source!r}.")
    require_had(name, kind="dataset")
    is_saved = any((checked_path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    loaded = _load(source, name, config or None, is_saved=is_saved)
    is_csv = not is_saved and any(part.info.builder_name == "csv" for part in loaded.values())
    names = ", ".join(sorted(loaded))
    if split is not None:
        if split not in loaded:
            raise InputError(f"A split of {source} was expected ({names}), but got {split!r}.")
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
    rows = {
        ours: rows_of(part, source, text_column=text_column, chat=chat, is_csv=is_csv) for ours, part in own.items()
    }
    require_text(rows, source)
    return rows


def _load(source: str, name: str, config: str | None, *, is_saved: bool) -> dict[str, Dataset]:
    """Return all splits of a data set by name."""
    from datasets import Dataset, load_dataset, load_from_disk

    try:
        # Of a folder on this disk it would still tell a server that it was read.
        with quick(name), datasets_offline(constants.HF_HUB_OFFLINE or Path(name).exists()):
            loaded = load_from_disk(name) if is_saved else load_dataset(name, config)
    except Exception as error:  # the library raises many kinds, down to those of the file formats
        raise InputError(f"The data set {source} could not be loaded: {first_line(error)}.") from error
    return {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded)


@contextmanager
def datasets_offline(is_offline: bool) -> Iterator[None]:
    """Keep the datasets library from contacting a server while the block runs, if offline mode is set."""
    import datasets

    # It read this setting of huggingface_hub's when it was imported.
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or is_offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
