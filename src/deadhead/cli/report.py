"""`deadhead report` and `deadhead watch`: a run's page, afterwards and live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from deadhead.cli.console import AsJson, Quiet, console, print_json, progress
from deadhead.errors import InputError

if TYPE_CHECKING:
    from deadhead.training.recipe import DataRecipe

_RUN = "A run's folder, or a checkpoint that deadhead prune, train or finetune wrote."
_SENTENCE = "The gardener cut the dead flowers, and the rose that she had planted bloomed."
_CODE = "def read(self, size=-1):\n    return self.file.read(size)"
Sentence = Annotated[
    str | None,
    typer.Option("--sentence", help="What attention is shown on.", show_default=False),
]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help=_RUN, show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; by default report.html in RUN.", show_default=False)
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="RUN",
            help="A run to compare with, may be repeated; by default those beside RUN, on the same text.",
            show_default=False,
        ),
    ] = None,
    sentence: Sentence = None,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Show where heads look, which loads the models.")
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's page: one HTML file that opens from disk and needs no network."""
    from deadhead.report.page import write_page
    from deadhead.report.run_facts import RunFacts, sibling_points
    from deadhead.report.trial import run_attention

    path = run / "report.html" if out is None else out
    if path.is_dir():
        raise InputError(f"The page is one file, but {path} is a folder; name a file with --out.")
    facts = RunFacts(run)
    patterns: dict[str, Any] | None = None
    text = sentence or _sentence(_source(run))
    with progress(quiet) as show:
        facts.update()
        if attention:
            try:
                patterns = run_attention(run, text, lambda done, total: show("reading attention", done, total, {}))
            except InputError as error:
                if sentence is not None:
                    raise
                console.print(f"Without attention: {escape(str(error))}")
    others = sibling_points(facts, beside or None)
    write_page([{"facts": facts.facts, "others": others, "attention": patterns, "sentence": text}], path)
    size = path.stat().st_size
    if as_json:
        print_json({"page": str(path), "bytes": size, "runs_beside": len({point["run"] for point in others})})
        return
    console.print(f"{escape(str(path))}: {size / 1e6:.1f} MB, open it in a browser.")


def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help=_RUN, show_default=False)],
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Of the page; by default 6007, or any free one."),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="The text to try heads on; by default the run's own, else 'stdlib'."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Held-out tokens that are scored at each click.")] = 2048,
    sentence: Sentence = None,
) -> None:
    """Serve the page of one or more runs live, on this machine alone, with heads to switch off and on."""
    from deadhead.report.run_facts import RunFacts
    from deadhead.report.server import WatchedRun, serve
    from deadhead.report.trial import Trial
    from deadhead.training.recipe import changed
    from deadhead.training.run import sample_prompt

    watched = []
    for folder in runs:
        RunFacts(folder)  # what is no run is said before anything is loaded
        source = _source(folder)
        # In the run's folder the text lies in tokens already; another text is read anew.
        cache = folder / "tokens" if data is None else None
        trial = Trial(folder, changed(source, source=data), cache=cache, tokens=tokens)
        prompt = sample_prompt(source.source)
        watched.append(WatchedRun(folder, trial, sentence=sentence or _sentence(source), prompt=prompt))

    def ready(address: str) -> None:
        console.print(f"{escape(address)}\nThe page is there until Ctrl-C; nobody can open it without the token.")
        if open_it:
            import webbrowser

            webbrowser.open(address)

    try:
        serve(watched, port=port, ready=ready)
    except KeyboardInterrupt:
        # This is how watching ends, not how it fails.
        return


def _source(folder: Path) -> DataRecipe:
    """Return the text of a run, or the one that commands take where none is named."""
    from deadhead.training.recipe import DataRecipe, load_recipe
    from deadhead.training.run import RECIPE_FILE

    recipe = folder / RECIPE_FILE
    return load_recipe(recipe).data if recipe.is_file() else DataRecipe()


def _sentence(data: DataRecipe) -> str:
    return _CODE if data.source == "stdlib" else _SENTENCE
