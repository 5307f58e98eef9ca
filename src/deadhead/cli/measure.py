"""`deadhead eval`, `generate` and `bench`: how good and how fast a model is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from deadhead.cli.console import (
    AsJson,
    Device,
    Dtype,
    Model,
    Quiet,
    console,
    errors,
    load_torch,
    of_hub,
    print_json,
    progress,
)
from deadhead.cli.further import Further, Show, TaskLimit, TaskNames, WithReplies, asked, print_replies, print_tasks
from deadhead.cli.settings import takes_settings
from deadhead.errors import InputError
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import DataRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


On = Annotated[Literal["train", "valid", "test"], typer.Option(help="The split of the text to score.")]
Rows = Annotated[int, typer.Option(min=1, max=2**20, help="Rows in a batch.")]
Window = Annotated[
    int | None, typer.Option(min=2, max=2**24, help="Tokens that a model without memory sees at once (512).")
]


def load_measured(path: Path, device: str | None, dtype: str | None) -> PreTrainedModel:
    """Load a model to measure; if it was saved with gates on, keep them on and print a line that says so."""
    from deadhead.checkpoints import checkpoint
    from deadhead.checkpoints.declared import has_gates
    from deadhead.checkpoints.gate_files import has_gates_among_weights
    from deadhead.modes import best_device

    device = device or str(best_device())
    if not path.is_dir() or not (has_gates(path) or has_gates_among_weights(path)):
        return checkpoint.load(path, device=device, dtype=dtype)
    model, gates = checkpoint.load_gated(path, device=device, dtype=dtype)
    errors.print(
        f"{escape(str(path))} has gates, which stay on here: {gates.sparsity:.1%} of its heads are closed, not cut; "
        "deadhead.load returns the model without gates, if deadhead wrote the folder."
    )
    return model


def require_scored(path: Path, settings: dict[str, Any], *, is_text_read: bool) -> PreTrainedModel:
    """Check that a model can be scored on the text, if one is read, and return the model without its weights."""
    from deadhead.checkpoints.checkpoint import load_skeleton
    from deadhead.measure.losses import require_language_model
    from deadhead.training.runs.inputs import require_default_text

    declared = load_skeleton(path)
    require_language_model(declared, "Perplexity")
    if is_text_read and "source" not in settings:
        require_default_text(declared.config.model_type)
    return declared


def shared_options(device: Device = None, dtype: Dtype = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Declare the options that `evaluate` and `compare` share, besides those of the text."""


@takes_settings(DataRecipe, without=("tokenizer", "vocab_size"), also=shared_options)
def evaluate(
    model: Model,
    on: On = "valid",
    limit: Annotated[int | None, typer.Option(min=1, max=10**15, help="Score at most this many tokens.")] = None,
    batch_size: Rows = 8,
    window: Window = None,
    replies: WithReplies = False,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="With --replies: how close it is to this model, on this model's replies."),
    ] = None,
    show: Show = 0,
    tasks: TaskNames = None,
    task_limit: TaskLimit = None,
    *,
    settings: dict[str, Any],
    **shared: Any,
) -> None:
    """Measure perplexity and bits per byte on a text, with every token scored once; or replies, or tasks."""
    quiet, as_json = shared["quiet"], shared["as_json"]
    text_of = changed(DataRecipe(), **settings)
    further = asked(replies, show, tasks, task_limit)
    if reference is not None and (not further.replies or reference == model):
        raise InputError("--reference names another model that --replies compares with; give both, or leave it out.")
    load_torch(quiet or as_json, model, reference, of_hub(settings.get("source")))
    from deadhead.data import load_text, load_tokenizer
    from deadhead.measure.evaluation import evaluate as measure
    from deadhead.training.processes import counted

    is_text_read = further.is_text_read(settings)
    # The reference first, as replies are compared.
    paths = [path for path in (reference, model) if path is not None]
    for path in paths:
        require_scored(path, settings, is_text_read=is_text_read and path == model)
    with further.ready(quiet=quiet or as_json) as measure_further:
        networks = {str(path): load_measured(path, shared["device"], shared["dtype"]) for path in paths}
        with progress(quiet) as report:
            result = None
            if is_text_read:
                text, _ = load_text(
                    text_of.source,
                    tokenizer=load_tokenizer(model),
                    **text_of.reading,
                    progress=counted(report, "reading text, kB"),
                )
                result = measure(
                    networks[str(model)],
                    text.splits[on],
                    batch_size=batch_size,
                    limit=limit,
                    window=window,
                    progress=counted(report, "evaluating"),
                )
            unscored = None if reference is None else str(reference)
            found: Further = measure_further(networks, report, batch_size=batch_size, unscored=unscored)
    if as_json:
        values = {**({} if result is None else asdict(result)), **found.values(str(model))}
        if reference is not None:
            values["reference"] = found.values(str(reference))
        print_json({**values, **({"shown": found.shown(show)} if show else {})})
        return
    if result is not None:
        console.print(
            f"perplexity {result.perplexity:.4f} a token, {result.word_perplexity:.4g} a word; "
            f"{result.bits_per_byte:.4f} bits/byte; {result.tokens:,} tokens at {result.tokens_per_second:,.0f}/s"
        )
        console.print(f"read in {result.cut}")
    for name, said in found.replies.items():
        console.print(f"{escape(Path(name).name)}: {said.said}")
    print_replies(found, show)
    if further.tasks:
        print_tasks(found.tasks[str(model)])


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Beginning of the text.")] = "def ",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**24)] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 picks the most likely token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Random seed.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    load_torch(as_json, model)
    from deadhead.checkpoints.checkpoint import load_skeleton
    from deadhead.data import load_tokenizer
    from deadhead.measure.generate import generate_text
    from deadhead.measure.losses import require_language_model

    require_language_model(load_skeleton(model), "Continuing a text")
    network = load_measured(model, device, dtype)
    text = generate_text(
        network, load_tokenizer(model), prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        console.print(escape(text))


def bench(
    model: Model,
    dense: Annotated[Path | None, typer.Option(help="The model to compare with.")] = None,
    workload: Annotated[Literal["prefill", "decode", "train"], typer.Option()] = "prefill",
    batch_size: Annotated[int, typer.Option(min=1, max=2**20)] = 8,
    length: Annotated[int, typer.Option(min=1, max=2**24, help="Tokens in each text.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, max=10**6)] = 10,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Time a model, or a pruned and a dense one in turn, and compare the speedup with what the removed FLOPs allow."""
    load_torch(as_json, model, dense)
    from deadhead.checkpoints.checkpoint import load_skeleton
    from deadhead.layouts.inputs import positions_read
    from deadhead.measure.cost import model_cost
    from deadhead.measure.timing import bench as run_bench
    from deadhead.measure.timing import efficiency, require_timed

    for path in filter(None, (model, dense)):
        require_timed(load_skeleton(path), workload, length)
    models = {"model": load_measured(model, device, dtype)}
    if dense is not None:
        models = {"dense": load_measured(dense, device, dtype), **models}
    # Without a past every token of a text that goes on sees half of it on average; others see all.
    positions = {name: positions_read(network, length) for name, network in models.items()}
    costs = {}
    for name, network in models.items():
        sees_half = workload != "decode" and network.can_generate()
        costs[name] = model_cost(network, length=positions[name] // 2 if sees_half else positions[name])
    timings = run_bench(models, workload=workload, batch_size=batch_size, length=length, repeats=repeats)
    result: dict[str, object] = {
        name: {**asdict(timing), "flops_per_token": costs[name].flops_per_token} for name, timing in timings.items()
    }
    if dense is not None:
        seconds = timings["dense"].seconds, timings["model"].seconds
        flops = costs["dense"].flops_per_token, costs["model"].flops_per_token
        result |= {
            "speedup": seconds[0] / seconds[1],
            "speedup_the_flops_allow": flops[0] / flops[1],
            "efficiency": efficiency(*seconds, *flops),
        }
    if as_json:
        print_json(result)
        return
    table = Table(title=f"{workload}, {batch_size} × {positions['model']} tokens, median of {repeats}")
    for column in ("", "ms", "tokens/s", "FLOPs/token"):
        table.add_column(column, justify="right")
    for name, timing in timings.items():
        flops_per_token = f"{costs[name].flops_per_token:,.0f}"
        table.add_row(name, f"{timing.seconds * 1e3:.2f}", f"{timing.tokens_per_second:,.0f}", flops_per_token)
    console.print(table)
    if dense is not None:
        console.print(
            f"speedup {result['speedup']:.2f}; the removed FLOPs allow {result['speedup_the_flops_allow']:.2f}: "
            f"efficiency {result['efficiency']:.2f}"
        )
