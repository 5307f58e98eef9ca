"""The application that joins all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from deadhead import __version__
from deadhead.cli import compare, export, measure, model, phases, report, run, sweep
from deadhead.cli.settings import PhaseCommand

app = typer.Typer(
    name="deadhead",
    help="Find the dead heads of a Transformer language model and cut them off.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deadhead {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find the dead heads of a Transformer language model and cut them off."""


app.command()(run.demo)
app.command()(run.run)
for phase in (phases.train, phases.prune, phases.finetune):
    app.command(cls=PhaseCommand)(phase)
app.command(cls=PhaseCommand)(sweep.sweep)
app.command()(model.cut)
app.command()(model.inspect)
app.command()(export.export)
app.command("eval", cls=PhaseCommand)(measure.evaluate)
app.command(cls=PhaseCommand)(compare.compare)
app.command()(measure.generate)
app.command()(measure.bench)
app.command()(report.report)
app.command()(report.watch)
