"""What the commands share: the console, progress bars, options, and how errors leave."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from deadhead.disk.files import json_text

if TYPE_CHECKING:
    from deadhead.training.processes import Progress as Report

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A checkpoint folder, or a name on the Hugging Face hub.", show_default=False),
]
Data = Annotated[
    str, typer.Option("--data", help="A text file, a directory, 'stdlib', or hf:NAME[:CONFIG].", show_default=True)
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to",
        metavar="TRACKER",
        help="Also report to a tracker through transformers, such as wandb; may be repeated.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where to run, such as cpu or cuda; by default the accelerator there is."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Load the weights as this; by default as they were saved."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything random.")]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield a function that shows progress with rate and time left; silent with `quiet` or without a terminal."""
    if quiet or not errors.is_terminal:
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bars:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, numbers="")
            shown = {"loss": "loss {:.3f}", "sparsity": "closed {:.0%}"}
            numbers = "  ".join(text.format(logs[key]) for key, text in shown.items() if key in logs)
            bars.update(tasks[name], completed=done, total=total, numbers=numbers)

        yield report


@contextmanager
def bytes_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows how many bytes are done, with rate and time left; silent as `progress` is.

    What is named "checking" is shown beside the bytes, as a count.
    """
    if quiet or not errors.is_terminal:
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[checked]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as bars:
        task = bars.add_task("cut", total=None, checked="")

        def report(name: str, done: int, total: int) -> None:
            if name == "checking":
                bars.update(task, checked=f"{done}/{total} layers checked")
            else:
                bars.update(task, completed=done, total=total)

        yield report


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something goes on whose end cannot be told; silent without a terminal."""
    if not errors.is_terminal:
        yield
        return
    with errors.status(escape(what)):
        yield


def load_torch(quiet: bool = False) -> None:
    """Import what commands with a model need, which takes seconds, and say so; silent as `progress` is."""
    # Of several processes that train together one speaks.
    is_silent = quiet or os.environ.get("RANK", "0") != "0"
    with nullcontext() if is_silent else working("loading torch and transformers"):
        import_module("deadhead.checkpoints.checkpoint")


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json_text(value) + "\n")
