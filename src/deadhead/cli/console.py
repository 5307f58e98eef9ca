"""What the commands share: the console, progress bars, options, and the output of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich.progress
import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from deadhead.disk.files import json_text

if TYPE_CHECKING:
    from deadhead.training.processes import Progress as Report

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A checkpoint folder, a GGUF file, or a name on the Hugging Face hub.")
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TRACKER", help="Also report to a tracker through transformers, such as wandb; may be repeated."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device to run on, such as cpu or cuda; by default the accelerator, if any.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Dtype to load the weights in; by default the one they were saved in."),
]


class _Rate(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def _bars(*columns: rich.progress.ProgressColumn) -> rich.progress.Progress:
    ends = "{task.fields[more]}", rich.progress.TimeElapsedColumn(), rich.progress.TimeRemainingColumn()
    return rich.progress.Progress("{task.description:>20}", rich.progress.BarColumn(), *columns, *ends, console=errors)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield a function that shows progress with rate and remaining time; silent with `quiet` or without a terminal."""
    if quiet or not errors.is_terminal:
        yield lambda *_: None
        return
    with _bars(rich.progress.MofNCompleteColumn(), _Rate()) as bars:
        tasks: dict[str, Any] = {}

        def report(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, more="")
            shown = {"loss": "loss {:.3f}", "divergence": "{:.3f} nats off", "sparsity": "closed {:.0%}"}
            numbers = "  ".join(text.format(logs[key]) for key, text in shown.items() if key in logs)
            bars.update(tasks[name], completed=done, total=total, more=numbers)

        yield report


@contextmanager
def bytes_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows how many bytes are done, with rate and remaining time; silent as `progress` is.

    The step named "checking" is shown as a count next to the bytes.
    """
    if quiet or not errors.is_terminal:
        yield lambda *_: None
        return
    with _bars(rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()) as bars:
        task = bars.add_task("cut", total=None, more="")

        def report(name: str, done: int, total: int) -> None:
            if name == "checking":
                bars.update(task, more=f"{done}/{total} layers checked")
            else:
                bars.update(task, completed=done, total=total)

        yield report


def working(what: str) -> AbstractContextManager[object]:
    """Show that work of unknown length is in progress; silent without a terminal."""
    return errors.status(escape(what)) if errors.is_terminal else nullcontext()


def load_torch(quiet: bool, *names: Path | str | None) -> None:
    """Import what commands with a model need, and show that this takes seconds; silent as `progress` is.

    First, look for the models and data sets (hf:NAME) that the command names, so that a wrong name is refused at once.
    """
    from deadhead.disk.hub import require_had

    for name in map(str, filter(None, names)):
        if name.startswith("hf:"):
            require_had(name.split(":")[1], kind="dataset")
        else:
            require_had(name)
    # Of several processes that train together one speaks.
    is_silent = quiet or os.environ.get("RANK", "0") != "0"
    with nullcontext() if is_silent else working("loading torch and transformers"):
        import_module("deadhead.checkpoints.checkpoint")


def of_hub(source: str | None) -> str | None:
    """Return the source of a text if it is a data set of the hub, which has to be looked for; otherwise None."""
    return source if source is not None and source.startswith("hf:") else None


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json_text(value) + "\n")
