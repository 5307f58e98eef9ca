"""`deadhead train`, `prune` and `finetune`: one phase at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.markup import escape

from deadhead.cli.console import (
    AsJson,
    Device,
    Dtype,
    Quiet,
    ReportTo,
    console,
    errors,
    load_torch,
    of_hub,
    print_json,
    progress,
)
from deadhead.cli.settings import takes_settings
from deadhead.errors import InputError
from deadhead.plans.kinds import FAST
from deadhead.training.recipes.fields import option_name
from deadhead.training.recipes.reading import changed, load_recipe
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, Recipe

if TYPE_CHECKING:
    from deadhead.training.processes import Progress as Report
    from deadhead.training.runs.beginning import Phase
    from deadhead.training.runs.forecast import Part

_S = TypeVar("_S", bound=BaseModel)

ModelOption = Annotated[
    Path | None, typer.Option(help="The checkpoint folder, GGUF file, or name on the hub, to start from.")
]
RequiredModel = Annotated[
    Path, typer.Option(help="The checkpoint folder, GGUF file, or name on the hub, to start from.")
]
Out = Annotated[Path, typer.Option(help="Folder of the checkpoint to write.")]
RecipeOption = Annotated[Path | None, typer.Option(help="Take settings that are not given here from this recipe.")]
Teacher = Annotated[Path | None, typer.Option(help="The model to distil from: a folder, or a name on the hub.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in OUT.work.")]

Fast = Annotated[bool, typer.Option("--fast", help=f"Rank by --criterion {FAST}: nothing is learned before the cut.")]


def take_fast(fast: bool, settings: dict[str, Any]) -> None:
    """Add the criterion that --fast stands for to the settings, if it was given; refuse another criterion with it."""
    if not fast:
        return
    if settings.get("criterion") not in (None, FAST):
        raise InputError(f"--fast stands for --criterion {FAST}, but --criterion {settings['criterion']} is given too.")
    settings["criterion"] = FAST


def shared_options(
    device: Device = None,
    dtype: Dtype = None,
    recipe: RecipeOption = None,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Declare the options that all phases share and take as `shared`."""


@takes_settings(
    ModelRecipe,
    DataRecipe,
    PhaseRecipe,
    Recipe,
    without=("lora_rank", "distill", "distill_temperature"),
    also=shared_options,
)
def train(
    out: Out, model: ModelOption = None, resume: Resume = False, *, settings: dict[str, Any], **shared: Any
) -> None:
    """Train a dense All-attention Transformer or Transformer-XL from scratch, or train a model further."""
    base = begun(shared.pop("recipe"), settings)
    given = base.model
    if model is None and given.from_ is not None:
        model = Path(given.from_)
    fresh = {
        **ModelRecipe.model_fields,
        **{name: DataRecipe.model_fields[name] for name in ("tokenizer", "vocab_size")},
    }
    given_sizes = sorted(settings.keys() & fresh.keys())
    if model is not None and given_sizes:
        option = option_name(given_sizes[0], fresh[given_sizes[0]])
        raise InputError(f"{option} is for a fresh model, but {model} has its own; leave {option} out.")
    if settings.get("architecture", given.architecture) != given.architecture:
        # What the recipe says of the other architecture's layers does not hold.
        given = given.model_copy(update={"persistent": None, "feed_forward": None})
    shape = section_of(given, settings)
    text, phase = section_of(base.data, settings), section_of(base.train, settings)
    _run("train", phase, out, model or shape, text, base.seed, resume=resume, **shared)


@takes_settings(DataRecipe, PruneRecipe, Recipe, without=("tokenizer", "vocab_size"), also=shared_options)
def prune(
    out: Annotated[Path | None, typer.Option(help="Folder of the checkpoint to write; not for --dry-run.")] = None,
    *,
    model: RequiredModel,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be left and how much memory training would take.")
    ] = False,
    resume: Resume = False,
    recover: Annotated[
        int, typer.Option(min=0, help="Steps in which the cut model learns from the dense one.  [default: 0]")
    ] = 0,
    fast: Fast = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Keep one layer of the model in memory at a time; units are ranked.")
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse before the start what would take more memory than this, such as 24GiB.")
    ] = None,
    settings: dict[str, Any],
    cut: Annotated[bool, typer.Option(help="Cut the dead heads, or keep the gates.  [default: cut]")] = True,
    teacher: Teacher = None,
    **shared: Any,
) -> None:
    """Find the heads and hidden units of a model that matter least, and cut them off.

    One budget says how much to cut, in shares of the model as it is; with --l0, training finds how much.

    By default, the sizes of a pretrained language model's layers are learned without training a weight, and what is
    left is fitted to the dense model after the cut. Gates are trained if the budget is a share of heads, or if an
    option of theirs is given.

    The teacher of --distill and --recover is the model itself, unless --teacher names another.
    """
    take_fast(fast, settings)
    base = begun(shared.pop("recipe"), settings)
    phase = section_of(base.prune, settings)
    text = section_of(base.data, settings)
    if stream and not cut:
        raise InputError("--no-cut keeps gates on, but --stream uses none; leave out one of the two.")
    if dry_run:
        if stream:
            phase = _streamable(phase, text, recover=recover, teacher=teacher, max_memory=max_memory, **shared)
        how = {name: shared[name] for name in ("device", "dtype", "quiet", "as_json")}
        _dry_run(model, phase, text, recover, max_memory, cut=cut, streamed=stream, **how)
        return
    if out is None:
        raise InputError("A folder for the pruned model was expected, but none was given; add --out, or --dry-run.")
    options: dict[str, Any] = {"resume": resume, "teacher": teacher, "recover": recover, "max_memory": max_memory}
    if stream:
        _prune_streamed(model, phase, text, out=out, seed=base.seed, **options, **shared)
        return
    options["cut"] = cut
    _run("prune", phase, out, model, text, base.seed, **options, **shared)


def _streamable(
    phase: PruneRecipe, text: DataRecipe, *, quiet: bool, as_json: bool, report_to: list[str] | None, **options: Any
) -> PruneRecipe:
    """Return the recipe for --stream, or refuse options that it does not allow."""
    load_torch(quiet or as_json)
    from deadhead.training.runs.options import Options
    from deadhead.training.runs.streamed import streamable

    return streamable(text, phase, Options(report_to=report_to or (), **options))


def _prune_streamed(
    model: Path,
    phase: PruneRecipe,
    text: DataRecipe,
    *,
    quiet: bool,
    as_json: bool,
    report_to: list[str] | None,
    **options: Any,
) -> None:
    load_torch(quiet or as_json, model, of_hub(text.source))
    from deadhead.training.runs.options import Options
    from deadhead.training.runs.streamed import run_streamed

    parts: list[Part] = []
    with progress(quiet) as report:
        if not (quiet or as_json):
            report = announcing(report, parts)
            options["announce"] = parts.extend
        given = Options(progress=report, report_to=report_to or (), **options)
        result = run_streamed(model, text, phase, given)
    _show(options["out"], result.to_dict(), as_json=as_json)


@takes_settings(DataRecipe, PhaseRecipe, Recipe, without=("tokenizer", "vocab_size"), also=shared_options)
def finetune(
    out: Out,
    model: RequiredModel,
    resume: Resume = False,
    *,
    settings: dict[str, Any],
    teacher: Teacher = None,
    **shared: Any,
) -> None:
    """Train a cut model further, to recover what the cut cost."""
    base = begun(shared.pop("recipe"), settings)
    text, phase = section_of(base.data, settings), section_of(base.finetune, settings)
    _run("finetune", phase, out, model, text, base.seed, resume=resume, teacher=teacher, **shared)


def _dry_run(
    model: Path,
    phase: PruneRecipe,
    text: DataRecipe,
    recover: int,
    max_memory: str | None,
    *,
    cut: bool,
    streamed: bool,
    device: str | None,
    dtype: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    load_torch(quiet or as_json, model)
    from deadhead.checkpoints import checkpoint
    from deadhead.modes import best_device, free_memory, on_device
    from deadhead.report.tables import dry_run_table, forecast_sentence
    from deadhead.training.phases.choosing import measure_budget_latency
    from deadhead.training.phases.defaults import with_criterion
    from deadhead.training.runs.dry_run import dry_run
    from deadhead.training.runs.forecast import forecast, require_estimated, require_memory
    from deadhead.training.runs.inputs import load_ungated, require_trainable, require_ungated
    from deadhead.training.runs.options import Options
    from deadhead.training.runs.self_text import is_self

    writes, most = is_self(text), Options(max_memory=max_memory).max_memory
    place = None if device is None else checkpoint.named_device(device)
    latency = None
    is_timed = phase.budget is not None and phase.budget.kind == "speedup"
    # Without weights, unless it is timed: what they are makes no difference.
    require_ungated(model)
    network = load_ungated(model, dtype=dtype) if is_timed else checkpoint.load_skeleton(model)
    phase = with_criterion(phase, network, recovers=recover > 0)
    require_trainable(network, phase)
    if is_timed:
        with progress(quiet) as report, on_device(place):
            latency = measure_budget_latency(network, phase, report)
    elif dtype is not None:
        network.to(checkpoint.named_dtype(dtype))  # type: ignore[arg-type]
    result = dry_run(network, phase, latency=latency)
    parts, free = [], 0
    if network.can_generate():
        with on_device(place):
            parts = forecast(network, phase, recover=recover, cut=cut, writes=writes, streamed=streamed)
            free = free_memory(best_device())
    if not as_json:
        console.print(dry_run_table(result, phase))
        if parts:
            console.print(forecast_sentence(parts, free), markup=False)
    if most is not None:
        require_estimated(network)
        require_memory(parts, int(most))
    if as_json:
        told = [{"what": part.what, "seconds": part.seconds, "memory": part.memory} for part in parts]
        print_json(result.to_dict() | {"parts": told})


def announcing(report: Report, parts: list[Part]) -> Report:
    """Return a progress function that first prints what pruning will do, as soon as that is known.

    It prints nothing before the first step, because the phase may still be refused until then.
    """
    from deadhead.modes import best_device, free_memory
    from deadhead.report.tables import forecast_sentence

    def told(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
        if parts:
            errors.print(forecast_sentence(parts, free_memory(best_device())), markup=False)
            parts.clear()
        report(name, done, total, logs)

    return told


def begun(recipe: Path | None, settings: dict[str, Any]) -> Recipe:
    """Return the recipe in a file, or the default one, with the settings of a run that were given."""
    return section_of(Recipe() if recipe is None else load_recipe(recipe), settings)


def section_of(section: _S, settings: dict[str, Any]) -> _S:
    """Return a section of a recipe with the given settings that belong to it."""
    return changed(section, **{name: value for name, value in settings.items() if name in type(section).model_fields})


def _run(
    name: Phase,
    phase: PhaseRecipe,
    out: Path,
    model: Path | ModelRecipe,
    text: DataRecipe,
    seed: int,
    *,
    cut: bool = True,
    report_to: list[str] | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    named = None if isinstance(model, ModelRecipe) else model
    load_torch(quiet or as_json, named, options.get("teacher"), of_hub(text.source))
    from deadhead.training.processes import is_main, leave
    from deadhead.training.runs.options import Options
    from deadhead.training.runs.single import run_single

    parts: list[Part] = []
    with progress(quiet or not is_main()) as report:
        if not (quiet or as_json):
            report = announcing(report, parts)
            options["announce"] = parts.extend
        given = Options(out=out, seed=seed, progress=report, report_to=report_to or (), **options)
        result = run_single(name, phase, model, text, given, cut=cut).to_dict()
    if leave():
        _show(out, result, as_json=as_json)


def _show(out: Path, result: dict[str, Any], *, as_json: bool) -> None:
    """Print the result of a phase."""
    if as_json:
        print_json(result)
        return
    heads = " ".join(str(count) for count in result["heads"])
    is_measured = "perplexity" in result
    worth = "perplexity {perplexity:.3f}, {bits_per_byte:.3f} bits/byte" if is_measured else "not measured on a text"
    found = result.get("hidden_units")
    hidden = "" if found is None else f", hidden units {' '.join(map(str, found))}"
    console.print(
        f"{escape(str(out))}: heads a layer {heads}{hidden}, {result['parameters']:,} parameters, "
        f"{worth.format_map(result)}"
    )
    if "unrecovered_perplexity" in result:
        console.print(f"Before recovery: perplexity {result['unrecovered_perplexity']:.3f}.")
    if "compensation" in result:
        from deadhead.compensation.record import card_line

        console.print(card_line(result["compensation"]))
    if "budget" in result:
        from deadhead.report.tables import budget_sentence

        console.print(budget_sentence(result["budget"]))
