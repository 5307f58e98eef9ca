"""`deadhead sweep`: a model pruned to several budgets, to choose one of the results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deadhead.cli.console import console, load_torch, of_hub, print_json, progress
from deadhead.cli.phases import (
    Fast,
    RequiredModel,
    Teacher,
    announcing,
    begun,
    section_of,
    shared_options,
    take_fast,
)
from deadhead.cli.settings import takes_settings
from deadhead.errors import InputError
from deadhead.plans.kinds import BUDGET_KINDS
from deadhead.training.recipes.fields import option_name
from deadhead.training.recipes.recipe import GATES_ONLY, DataRecipe, PruneRecipe, Recipe

if TYPE_CHECKING:
    from deadhead.training.runs.forecast import Part

PAGE_FILE = "sweep.html"


@takes_settings(
    DataRecipe,
    PruneRecipe,
    Recipe,
    without=("tokenizer", "vocab_size", *BUDGET_KINDS, *GATES_ONLY),
    also=shared_options,
)
def sweep(
    out: Annotated[Path, typer.Option(help="Folder to create for the pruned models, sweep.json and sweep.html.")],
    *,
    model: RequiredModel,
    params: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Shares of the parameters to keep, as 0.9,0.8,0.7.")
    ] = None,
    flops: Annotated[str | None, typer.Option(metavar="SHARES", help="Shares of a token's FLOPs to keep.")] = None,
    kv_cache: Annotated[str | None, typer.Option(metavar="SHARES", help="Shares of the KV cache to keep.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Shares of the heads to cut, as 0.1,0.25,0.5.")
    ] = None,
    speedup: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Speedups over the given model, as 1.1,1.25,1.5.")
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Pick the smallest model whose perplexity rises by at most this, as 5%."),
    ] = None,
    recover: Annotated[
        int, typer.Option(min=0, help="Steps in which each cut model learns from the dense one.  [default: 0]")
    ] = 0,
    replies: Annotated[
        bool,
        typer.Option(
            "--replies",
            help="Also have each model reply to 50 prompts, 200 tokens at most; compare it with the dense one on them.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in OUT.")] = False,
    fast: Fast = False,
    settings: dict[str, Any],
    teacher: Teacher = None,
    **shared: Any,
) -> None:
    """Prune a model to several budgets, and show the cost and quality of each result.

    One pass over the text serves all budgets. Each pruned model is a checkpoint in OUT. By default, the sizes of
    layers are learned, as in deadhead prune; where they cannot be learned, units are ranked by taylor.
    """
    given = {"params": params, "flops": flops, "kv_cache": kv_cache, "sparsity": sparsity, "speedup": speedup}
    asked = {kind: value for kind, value in given.items() if value is not None}
    if len(asked) != 1:
        options = ", ".join(_option(kind) for kind in given)
        came = " and ".join(map(_option, asked)) + " were" if asked else "none was"
        raise InputError(f"One budget with several values was expected ({options}), but {came} given; give one.")
    ((kind, text_of_values),) = asked.items()
    values = _numbers(kind, text_of_values)
    tolerated = None if max_loss is None else _share(max_loss)
    take_fast(fast, settings)
    quiet, as_json = shared["quiet"], shared["as_json"]
    # A recipe with a criterion of its own has a budget too.
    recipe = begun(shared["recipe"], {**settings, kind: values[0]})
    text = section_of(recipe.data, settings)
    phase = section_of(recipe.prune, {**settings, kind: values[0]})
    load_torch(quiet or as_json, model, teacher, of_hub(text.source))
    from deadhead.disk.files import write_text
    from deadhead.report.sweep_page import render_sweep, replies_table, sweep_table
    from deadhead.training.runs.replying import kept_replies
    from deadhead.training.runs.sweeping import sweep as run

    parts: list[Part] = []
    with progress(quiet) as report:
        options_of: dict[str, Any] = {"progress": report}
        if not (quiet or as_json):
            options_of = {"progress": announcing(report, parts), "announce": parts.extend}
        found = run(
            model,
            text,
            recipe=phase,
            max_loss=tolerated,
            replies=replies,
            out=out,
            resume=resume,
            recover=recover,
            teacher=teacher,
            seed=recipe.seed,
            device=shared["device"],
            dtype=shared["dtype"],
            report_to=shared["report_to"] or (),
            **options_of,
            **{kind: values},
        ).to_dict()
    write_text(out / PAGE_FILE, render_sweep(found, out.name, kept_replies(out)))
    if as_json:
        print_json(found)
        return
    console.print(sweep_table(found, str(out)))
    if (said := replies_table(found)) is not None:
        console.print(said)


def _option(kind: str) -> str:
    return option_name(kind, PruneRecipe.model_fields[kind])


def _numbers(kind: str, text: str) -> list[float]:
    """Return the values of a budget from a comma-separated list."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{_option(kind)} takes numbers with commas between them, as in 0.9,0.8,0.7, but got {text!r}."
        ) from None


def _share(text: str) -> float:
    """Return a share that is written as a number, or in per cent."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f"--max-loss takes a share, as in 5% or 0.05, but got {text!r}.") from None
    return value / 100 if text.endswith("%") else value
