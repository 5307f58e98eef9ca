"""`deadhead report` and `deadhead watch`: the page of a run, as a file and live."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from deadhead.cli.console import AsJson, Quiet, console, load_torch, print_json, progress
from deadhead.errors import require_extra
from deadhead.training.recipes.reading import changed

_RUN = "A run's folder, or a checkpoint that deadhead prune, train or finetune wrote."
Sentence = Annotated[str | None, typer.Option(help="The sentence whose attention is shown.")]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN)],
    out: Annotated[Path | None, typer.Option(help="The HTML file; by default report.html in RUN.")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="RUN",
            help="A run to compare with, may be repeated; by default the runs beside RUN on the same text.",
        ),
    ] = None,
    sentence: Sentence = None,
    attention: Annotated[bool, typer.Option(help="Show where heads attend, which loads the models once.")] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run: one HTML file that opens from disk and needs no network."""
    from deadhead.report.writing import report_run

    with progress(quiet) as show:
        found = report_run(
            run,
            out,
            others=beside or None,
            sentence=sentence,
            attention=attention,
            progress=lambda done, total: show("reading attention", done, total, {}),
        )
    if as_json:
        print_json({"page": str(found.path), "bytes": found.bytes, "runs_beside": list(found.runs_beside)})
        return
    console.print(f"{escape(str(found.path))}: {found.bytes / 1e6:.1f} MB, for a browser.")
    if attention and found.lacks:
        console.print(f"The page shows no attention: {escape(found.lacks)}")


def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help=_RUN)],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the page; by default 6007, or any free one.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    data: Annotated[
        str | None, typer.Option(help="The text to try heads on; by default that of the run, else 'stdlib'.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, max=10**9, help="Held-out tokens that are scored at each click.")
    ] = 2048,
    sentence: Sentence = None,
) -> None:
    """Serve a live page of one or more runs, on this machine only, where heads can be switched off and on."""
    require_extra("report", "starlette", "uvicorn", what="The live page")
    load_torch(quiet=False)
    from deadhead.report.server import WatchedRun, serve
    from deadhead.report.trial import Trial
    from deadhead.report.writing import default_sentence, text_of
    from deadhead.training.runs.run import sample_prompt

    watched = []
    for folder in runs:
        text = text_of(folder)
        # In the run's folder the text lies in tokens already; another text is read anew.
        cache = folder / "tokens" if data is None else None
        trial = Trial(folder, changed(text, source=data), cache=cache, tokens=tokens)
        shown = default_sentence(text) if sentence is None else sentence
        watched.append(WatchedRun(folder, trial, sentence=shown, prompt=sample_prompt(text.source)))

    def ready(address: str) -> None:
        console.print(f"{escape(address)}\nThe page is served until Ctrl-C; it does not open without the token.")
        if open_it:
            typer.launch(address)

    # This is how watching ends, not how it fails.
    with suppress(KeyboardInterrupt):
        serve(watched, port=port, ready=ready)
