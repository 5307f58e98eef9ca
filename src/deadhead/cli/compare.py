"""`deadhead compare`: the cost of several models, their quality on a text, and how similar they are."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from deadhead.cli.console import console, load_torch, of_hub, print_json, progress
from deadhead.cli.further import Show, TaskLimit, TaskNames, WithReplies, asked, print_replies, rows
from deadhead.cli.measure import On, Rows, Window, load_measured, require_scored, shared_options
from deadhead.cli.settings import takes_settings
from deadhead.errors import InputError
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import DataRecipe, PhaseRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deadhead.data import TokenStream
    from deadhead.measure.likeness import Likeness

_REPEATS, _ROWS, _LENGTH = 5, 4, 128


@takes_settings(DataRecipe, without=("tokenizer", "vocab_size"), also=shared_options)
def compare(
    models: Annotated[
        list[Path],
        typer.Argument(help="Checkpoint folders, GGUF files, or names on the hub; the first is the reference."),
    ],
    on: On = "valid",
    limit: Annotated[int, typer.Option(min=1, max=10**15, help="Score at most this many tokens.")] = 20_000,
    batch_size: Rows = 8,
    window: Window = None,
    replies: WithReplies = False,
    show: Show = 0,
    tasks: TaskNames = None,
    task_limit: TaskLimit = None,
    *,
    settings: dict[str, Any],
    **shared: Any,
) -> None:
    """Compare models: size, FLOPs, perplexity, speed, and how close each one is to the first.

    KL is how far a model's distribution of the next token is from that of the first model, in nats a token; the row
    below it is how often both models predict the same token. With --replies, both are also measured on the first
    model's replies. All models are in memory at once.
    """
    names = [str(model) for model in models]
    if len(set(names)) < max(len(names), 2):
        raise InputError("Two or more different models were expected; name the one to compare with first.")
    quiet, as_json = shared["quiet"], shared["as_json"]
    text_of = changed(DataRecipe(), **settings)
    further = asked(replies, show, tasks, task_limit)
    load_torch(quiet or as_json, *models, of_hub(settings.get("source")))
    from deadhead.data import load_text, load_tokenizer
    from deadhead.measure.cost import model_cost
    from deadhead.measure.evaluation import evaluate
    from deadhead.measure.timing import bench, require_timed
    from deadhead.training.processes import counted

    is_text_read = further.is_text_read(settings)
    for model in models:
        require_timed(require_scored(model, settings, is_text_read=is_text_read), "prefill", _LENGTH)
    with (
        further.ready(quiet=quiet or as_json) as measure_further,
        TemporaryDirectory(ignore_cleanup_errors=True) as cache,
    ):
        networks = {name: load_measured(Path(name), shared["device"], shared["dtype"]) for name in names}
        found: dict[str, dict[str, Any]] = {}
        texts: dict[str, TokenStream] = {}
        with progress(quiet) as report:
            for name, network in networks.items():
                cost = model_cost(network)
                costs = ("heads", "hidden_units", "parameters", "flops_per_token")
                found[name] = {each: getattr(cost, each) for each in costs}
                if not is_text_read:
                    continue
                text, _ = load_text(
                    text_of.source,
                    tokenizer=load_tokenizer(name),
                    **text_of.reading,
                    # Models with the same tokenizer read the same tokens.
                    cache_dir=cache,
                    progress=counted(report, "reading text, kB"),
                )
                texts[name] = text.splits[on]
                measured = evaluate(
                    network,
                    texts[name],
                    batch_size=batch_size,
                    limit=limit,
                    window=window,
                    progress=counted(report, f"evaluating {Path(name).name}"),
                )
                found[name] |= {each: getattr(measured, each) for each in ("perplexity", "bits_per_byte", "tokens")}
            first = names[0]
            for name in names[1:] if is_text_read else ():
                like = _likeness(networks, texts, name, first, limit=limit, batch_size=batch_size, window=window)
                found[name] |= {
                    "divergence": None if like is None else like.divergence,
                    "agreement": None if like is None else like.agreement,
                }
            more = measure_further(networks, report, batch_size=batch_size)
            timings = bench(networks, batch_size=_ROWS, length=_LENGTH, repeats=_REPEATS)
    for name, timing in timings.items():
        found[name] |= {"tokens_per_second": timing.tokens_per_second, **more.values(name)}
    if as_json:
        print_json({"models": found, **({"shown": more.shown(show)} if show else {})})
        return
    console.print(_table(found, is_text_read=is_text_read))
    print_replies(more, show)


def _likeness(
    networks: dict[str, PreTrainedModel],
    texts: dict[str, TokenStream],
    name: str,
    first: str,
    *,
    limit: int,
    batch_size: int,
    window: int | None,
) -> Likeness | None:
    """Compare a model with the first; return None if the two read the text as different tokens or rows."""
    from deadhead.measure.likeness import likeness
    from deadhead.training.phases.defaults import batches_of, segment_length

    model, reference = networks[name], networks[first]
    recipe = PhaseRecipe(batch_size=batch_size)
    if window is not None and not hasattr(model.config, "memory_length"):
        recipe = changed(recipe, sequence_length=window)
    same = texts[name].tokens.shape == texts[first].tokens.shape and (texts[name].tokens == texts[first].tokens).all()
    kinds = {hasattr(each.config, "memory_length") for each in (model, reference)}
    sizes = {each.config.get_text_config().vocab_size for each in (model, reference)}
    if not same or len(kinds) > 1 or len(sizes) > 1:
        return None
    length = segment_length(model, recipe)
    if kinds == {True} and segment_length(reference, recipe) != length:
        return None
    rows = -(-limit // length)
    return likeness(model, reference, islice(batches_of(model, texts[name], recipe, seed=0), -(-rows // batch_size)))


def _table(found: dict[str, dict[str, Any]], *, is_text_read: bool) -> Table:
    """Return a table with a column for each model; long names are folded, so that several columns fit."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in found:
        table.add_column(escape(name), justify="right", overflow="fold", min_width=11)

    def row(title: str, of: str, text: str, scale: float = 1.0) -> None:
        values = [None if each.get(of) is None else each[of] * scale for each in found.values()]
        table.add_row(title, *("–" if value is None else text.format(value) for value in values))

    table.add_row("heads", *(f"{sum(values['heads']):,}" for values in found.values()))
    if any(values["hidden_units"] for values in found.values()):
        table.add_row("hidden units", *(f"{sum(values['hidden_units']):,}" for values in found.values()))
    row("parameters", "parameters", "{:,}", 1)
    row("MFLOPs a token", "flops_per_token", "{:,.3f}", 1e-6)
    if is_text_read:
        row("perplexity", "perplexity", "{:,.3f}")
        row("bits a byte", "bits_per_byte", "{:.4f}")
        row("KL, nats a token", "divergence", "{:.4f}")
        row("same next token", "agreement", "{:.1%}")
    for title, cells in rows(found):
        table.add_row(escape(title), *cells)
    row("tokens a second", "tokens_per_second", "{:,.0f}")
    return table
