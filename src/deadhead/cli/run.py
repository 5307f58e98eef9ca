"""`deadhead demo` and `deadhead run`: whole runs of a recipe."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from deadhead.cli.console import AsJson, Quiet, ReportTo, console, errors, load_torch, of_hub, print_json, progress
from deadhead.errors import is_installed
from deadhead.training.recipes.fields import about
from deadhead.training.recipes.reading import changed, load_recipe, parse_recipe

if TYPE_CHECKING:
    from pydantic import BaseModel

    from deadhead.training.processes import Progress
    from deadhead.training.recipes.recipe import Recipe

Resume = Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")]
Steps = Annotated[float | None, typer.Option(min=0.001, max=1000, help="Multiply every phase's steps by this.")]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    resume: Resume = False,
    scale_steps: Steps = None,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train, prune and fine-tune a small model on the Python standard library's source, in minutes on two cores."""
    text = (importlib.resources.files("deadhead.recipes") / "demo.toml").read_text(encoding="utf-8")
    recipe = _scaled(parse_recipe(text, name="demo"), scale_steps)
    _execute(recipe, out, report_to or (), resume=resume, quiet=quiet, as_json=as_json)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe to run.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
    resume: Resume = False,
    scale_steps: Steps = None,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run all phases of a recipe: dense training, gates, cut, fine-tuning."""
    loaded = _scaled(load_recipe(recipe), scale_steps)
    _execute(loaded, out or Path("runs") / loaded.name, report_to or (), resume=resume, quiet=quiet, as_json=as_json)


def _scaled(recipe: Recipe, factor: float | None) -> Recipe:
    if factor is None:
        return recipe

    def scaled(section: BaseModel) -> dict[str, Any]:
        values = section.model_dump()
        fewest = {name: about(field, "scaled_from") for name, field in type(section).model_fields.items()}
        return values | {
            name: max(least, round(values[name] * factor))
            for name, least in fewest.items()
            if least is not None and values[name]
        }

    names = ("prune", "finetune") if recipe.dense_phase is None else ("train", "prune", "finetune")
    sections: dict[str, Any] = {name: scaled(getattr(recipe, name)) for name in names}
    tokens = recipe.evaluation_tokens
    if tokens is not None and factor < 1:
        sections["evaluation_tokens"] = max(1000, round(tokens * factor))
    return changed(recipe, **sections)


def _with_whole(report: Progress, recipe: Recipe) -> Progress:
    """Return a progress function that also reports the steps of all phases, and so shows the run's remaining time."""
    steps = recipe.planned_steps
    *starts, total = accumulate(steps.values(), initial=0)
    before = dict(zip(steps, starts, strict=True))

    def told(name: str, done: int, of: int, logs: dict[str, Any]) -> None:
        report(name, done, of, logs)
        if name in before:
            report("whole run", before[name] + done, total, {})

    report("whole run", 0, total, {})  # its line stands above those of the phases
    return told


def _execute(
    recipe: Recipe, folder: Path, report_to: Sequence[str], *, resume: bool, quiet: bool, as_json: bool
) -> None:
    load_torch(quiet or as_json, recipe.model.from_, of_hub(recipe.data.source))
    from deadhead.checkpoints import checkpoint
    from deadhead.plans.head_map import head_map_text
    from deadhead.plans.picture import save_head_map
    from deadhead.plans.plan import HeadPlan
    from deadhead.report.tables import stages_table, verdict
    from deadhead.report.writing import report_run
    from deadhead.training.callbacks.metrics import read_metrics
    from deadhead.training.processes import is_main, leave
    from deadhead.training.runs.run import Run
    from deadhead.training.runs.summary import METRICS_FILE

    with progress(quiet or not is_main()) as report:
        shown = _with_whole(report, recipe)
        run = Run.start(recipe, folder, resume=resume, progress=shown, report_to=report_to)
        if is_main() and not quiet and errors.is_terminal:
            errors.print(f"Watch it: deadhead watch {escape(str(folder))}")
        summary = run.execute()
    if not leave():
        return
    plan = HeadPlan.from_json(folder / checkpoint.PLAN_FILE)
    picture = folder / "head_map.png"
    if is_installed("matplotlib"):
        save_head_map(plan, read_metrics(folder / METRICS_FILE), picture)
    page = report_run(folder).path
    if as_json:
        print_json(summary)
        return
    console.print(stages_table(summary))
    console.print(verdict(summary))
    console.print(f"\n{head_map_text(plan)}\n")
    for name, text in summary["samples"].items():
        console.print(f"[bold]{name} model continues:[/bold]\n{escape(text)}\n")
    if picture.exists():
        console.print(f"Head map and gates over time: {escape(str(picture))}")
    else:
        console.print(escape("A picture of the head map needs matplotlib: pip install 'deadhead[report]'."))
    console.print(f"The run's page, for a browser: {escape(str(page))}")
    console.print(f"The pruned model: {escape(str(folder / 'pruned'))}")
