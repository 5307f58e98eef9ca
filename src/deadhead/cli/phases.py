"""`deadhead train`, `prune` and `finetune`: one phase at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.markup import escape

from deadhead.cli.console import AsJson, Device, Dtype, Quiet, ReportTo, console, load_torch, print_json, progress
from deadhead.cli.settings import takes_settings
from deadhead.errors import InputError
from deadhead.training.recipes.fields import option_name
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, Recipe

if TYPE_CHECKING:
    from deadhead.training.runs.single import Phase

_S = TypeVar("_S", bound=BaseModel)

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="The checkpoint folder, or name on the hub, to start from.", show_default=False),
]
RequiredModel = Annotated[
    Path, typer.Option("--model", help="The checkpoint folder, or name on the hub, to start from.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the checkpoint to write.", show_default=False)]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="Take settings that are not given here from this recipe.")
]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", help="The model to distil from: a folder, or a name on the hub.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.work.")]


@takes_settings(ModelRecipe, DataRecipe, PhaseRecipe, Recipe, without=("lora_rank", "distill", "distill_temperature"))
def train(
    out: Out,
    model: ModelOption = None,
    resume: Resume = False,
    *,
    settings: dict[str, Any],
    device: Device = None,
    dtype: Dtype = None,
    recipe: RecipeOption = None,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a dense All-attention Transformer or Transformer-XL from scratch, or go on with a model."""
    base = _with(_base(recipe), settings)
    given = base.model
    if model is None and given.from_ is not None:
        model = Path(given.from_)
    sizes = sorted(settings.keys() & ModelRecipe.model_fields.keys())
    if model is not None and sizes:
        option = option_name(sizes[0], ModelRecipe.model_fields[sizes[0]])
        raise InputError(f"{option} is for a fresh model, but {model} has its sizes; leave {option} out.")
    if settings.get("architecture", given.architecture) != given.architecture:
        # What the recipe says of the other architecture's layers does not hold.
        given = given.model_copy(update={"persistent": None, "feed_forward": None})
    shape = _with(given, settings)
    text, phase = _with(base.data, settings), _with(base.train, settings)
    options: dict[str, Any] = {"shape": shape, "device": device, "dtype": dtype}
    _run("train", phase, out, model, text, base.seed, resume, report_to, quiet, as_json, **options)


@takes_settings(DataRecipe, PruneRecipe, Recipe, without=("tokenizer", "vocab_size"))
def prune(
    out: Out,
    model: RequiredModel,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be left and what memory training would take.")
    ] = False,
    resume: Resume = False,
    *,
    settings: dict[str, Any],
    cut: Annotated[
        bool, typer.Option("--cut/--no-cut", help="Cut the dead heads, or keep the gates.  [default: cut]")
    ] = True,
    teacher: Teacher = None,
    device: Device = None,
    dtype: Dtype = None,
    recipe: RecipeOption = None,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train gates on a model's heads and cut the heads whose gates close, or rank heads and cut the lowest.

    How much goes is learned under --l0, or asked for by one budget, in shares of the model as it is.

    The teacher of --distill is the model itself, unless --teacher names another.
    """
    base = _with(_base(recipe), settings)
    phase = _with(base.prune, settings)
    if dry_run:
        _dry_run(model, phase, quiet, as_json)
        return
    text = _with(base.data, settings)
    options: dict[str, Any] = {"cut": cut, "teacher": teacher, "device": device, "dtype": dtype}
    _run("prune", phase, out, model, text, base.seed, resume, report_to, quiet, as_json, **options)


@takes_settings(DataRecipe, PhaseRecipe, Recipe, without=("tokenizer", "vocab_size"))
def finetune(
    out: Out,
    model: RequiredModel,
    resume: Resume = False,
    *,
    settings: dict[str, Any],
    teacher: Teacher = None,
    device: Device = None,
    dtype: Dtype = None,
    recipe: RecipeOption = None,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a cut model on, to recover what the cut cost."""
    base = _with(_base(recipe), settings)
    text, phase = _with(base.data, settings), _with(base.finetune, settings)
    options: dict[str, Any] = {"teacher": teacher, "device": device, "dtype": dtype}
    _run("finetune", phase, out, model, text, base.seed, resume, report_to, quiet, as_json, **options)


def _dry_run(model: Path, phase: PruneRecipe, quiet: bool, as_json: bool) -> None:
    load_torch(quiet or as_json)
    from deadhead.checkpoints import checkpoint
    from deadhead.measure.cost import skeleton
    from deadhead.report.dry_run import dry_run_table
    from deadhead.training.phases.choosing import measure_budget_latency
    from deadhead.training.runs.dry_run import dry_run

    latency = None
    if phase.budget is not None and phase.budget.kind == "speedup":
        network = checkpoint.load(model)
        with progress(quiet) as report:
            latency = measure_budget_latency(network, phase, report)
    else:
        # Without weights: what they are makes no difference.
        network = skeleton(checkpoint.load_config(model))
    result = dry_run(network, phase, latency=latency)
    if as_json:
        print_json(result.to_dict())
        return
    console.print(dry_run_table(result, phase))


def _base(recipe: Path | None) -> Recipe:
    from deadhead.training.recipes.reading import load_recipe

    return Recipe() if recipe is None else load_recipe(recipe)


def _changed(section: _S, **values: Any) -> _S:
    from deadhead.training.recipes.reading import changed

    return changed(section, **values)


def _with(section: _S, settings: dict[str, Any]) -> _S:
    """Return a section of a recipe with those of the settings that are its own."""
    return _changed(section, **{name: value for name, value in settings.items() if name in type(section).model_fields})


def _run(
    name: Phase,
    phase: PhaseRecipe,
    out: Path,
    model: Path | None,
    text: DataRecipe,
    seed: int,
    resume: bool,
    report_to: list[str] | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    load_torch(quiet or as_json)
    from deadhead.training.processes import is_main, leave
    from deadhead.training.runs.single import Options, finetune, prune, run_single

    with progress(quiet or not is_main()) as report:
        given: dict[str, Any] = {"out": out, "seed": seed, "resume": resume, "progress": report}
        given |= {"report_to": report_to or (), **options}
        if name == "train":
            shape = given.pop("shape")
            begun = shape if model is None else model
            done = run_single("train", phase, begun, text, Options(**given))
        else:
            call: Any = prune if name == "prune" else finetune
            done = call(model, text, recipe=phase, **given)
    result = done.to_dict()
    if not leave():
        return
    if as_json:
        print_json(result)
        return
    heads = " ".join(str(count) for count in result["heads"])
    blocks = "".join([", blocks ", " ".join(map(str, result["blocks"]))]) if "blocks" in result else ""
    console.print(
        f"{escape(str(out))}: heads a layer {heads}{blocks}, {result['parameters']:,} parameters, "
        f"perplexity {result['perplexity']:.3f}, {result['bits_per_byte']:.3f} bits/byte"
    )
    if "budget" in result:
        from deadhead.report.budget import budget_sentence

        console.print(budget_sentence(result["budget"]))
