"""Write the page of a run to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deadhead.disk.checksums import read_checksums
from deadhead.disk.files import write_json, write_text
from deadhead.disk.places import checked_path
from deadhead.disk.reading import read_object
from deadhead.errors import InputError, typed
from deadhead.report.page import render_page
from deadhead.report.run_facts import ATTENTION_OF, RunFacts, checkpoints_in, sibling_points
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import DataRecipe
from deadhead.training.runs.summary import RECIPE_FILE

REPORT_FILE = "report.html"
# Attention as it was read last, so that a page can be written anew without loading the models.
ATTENTION_FILE = "attention.json"
_SENTENCE = "The gardener cut the dead flowers, and the rose that she had planted bloomed."
_CODE = "def read(self, size=-1):\n    return self.file.read(size)"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of writing a page.

    Args:
        path: the HTML file.
        bytes: its size.
        runs_beside: names of the runs that it is compared with.
        lacks: why the page shows no attention, or "".
    """

    path: Path
    bytes: int
    runs_beside: tuple[str, ...]
    lacks: str


@typed
def report_run(
    run: str | Path,
    path: str | Path | None = None,
    *,
    others: Sequence[str | Path] | None = None,
    sentence: str | None = None,
    attention: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the page of a run: one HTML file that opens from disk and needs no network.

    Args:
        run: a run's folder, finished or not, or a checkpoint that a single phase wrote.
        path: the HTML file; None takes report.html in the folder.
        others: runs to compare with; None takes the runs beside it that were measured on the same text.
        sentence: the sentence whose attention is shown; None takes a default one.
        attention: whether to load the models and show where their heads attend.
        progress: called with the number of models read and in total.

    Raises:
        InputError: `run` or one of `others` is not the folder of a run, the sentence cannot be read, or the page cannot
            be written.
    """
    folder = checked_path(run)
    path = folder / REPORT_FILE if path is None else checked_path(path)
    if path.is_dir():
        raise InputError(f"A file was expected for the page, but {path} is a folder; name a file.")
    facts = RunFacts(folder)
    facts.update()
    points = sibling_points(facts, None if others is None else [checked_path(other) for other in others])
    text = default_sentence(text_of(folder)) if sentence is None else sentence
    patterns: dict[str, Any] | None = None
    lacks = "" if attention else "it was not asked for"
    if attention:
        try:
            patterns = _attention(folder, text, progress)
        except InputError as error:
            if sentence is not None:
                raise
            # A model that does not tell its attention has a page all the same.
            lacks = str(error)
    page = {"facts": facts.facts, "others": points, "attention": patterns, "sentence": text}
    write_text(path, render_page([page]))
    names = tuple(dict.fromkeys(point["run"] for point in points))
    return Report(path=path, bytes=path.stat().st_size, runs_beside=names, lacks=lacks)


def _attention(folder: Path, sentence: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Return attention patterns (see `run_attention`): the kept ones, if the models and the sentence are the same."""
    models = {name: read_checksums(path) for name, path in checkpoints_in(folder, ATTENTION_OF).items()}
    if not models:
        return {}
    path, read = folder / ATTENTION_FILE, {"models": models, "sentence": sentence}
    with suppress(InputError):
        kept = read_object(path, what="attention of a run")
        if kept.get("read") == read and isinstance(kept.get("patterns"), dict):
            return dict(kept["patterns"])
    progress(0, len(models))
    from deadhead.report.attention import run_attention  # loads torch, which the page itself does without

    patterns = run_attention(folder, sentence, progress)
    if all(models.values()):
        write_json(path, {"read": read, "patterns": patterns})
    return patterns


def text_of(folder: Path) -> DataRecipe:
    """Return the text that a run has learned from, or the default text of the commands."""
    recipe = checked_path(folder) / RECIPE_FILE
    return load_recipe(recipe).data if recipe.is_file() else DataRecipe()


def default_sentence(data: DataRecipe) -> str:
    """Return a default sentence that suits a text."""
    return _CODE if data.source == "stdlib" else _SENTENCE
