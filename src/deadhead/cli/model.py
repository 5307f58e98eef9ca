"""`deadhead cut` and `deadhead inspect`: a model and its head plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from deadhead.cli.console import AsJson, Device, Dtype, Model, Quiet, bytes_progress, console, load_torch, print_json
from deadhead.errors import InputError, is_installed
from deadhead.plans.head_map import head_map_text
from deadhead.plans.plan import HeadPlan
from deadhead.training.recipes.reading import changed, load_recipe
from deadhead.training.recipes.recipe import PruneRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from deadhead.measure.costs import Cost
    from deadhead.training.runs.recipe_cost import ShapeCost


def cut(
    model: Model,
    plan: Annotated[Path, typer.Option(help="The head plan, a JSON file.")],
    out: Annotated[Path, typer.Option(help="Folder of the cut model.")],
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--in-memory",
            help="Cut shard by shard with at most one layer in memory, or load the model; by default shard by shard if "
            "the checkpoint is in shards or has 2 GiB or more.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped cut from OUT.work.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Cut a model by an existing head plan."""
    head_plan = HeadPlan.from_json(plan)
    load_torch(quiet or as_json, model)
    from deadhead.streaming.cutting import cut_checkpoint

    with bytes_progress(quiet) as report:
        done = cut_checkpoint(
            model, head_plan, out, stream=stream, resume=resume, device=device, dtype=dtype, progress=report
        )
    if as_json:
        print_json(asdict(done))
        return
    console.print(head_map_text(head_plan))
    console.print(
        f"{escape(str(out))}: {done.before.parameters:,} → {done.after.parameters:,} parameters, "
        f"{done.before.flops_per_token:,.0f} → {done.after.flops_per_token:,.0f} FLOPs a token"
    )
    if done.why_in_memory is not None:
        console.print(f"It was cut in memory, because {escape(done.why_in_memory)}.")
    if done.why_not_stock is not None:
        console.print(f"It has modelling code of its own, because {escape(done.why_not_stock)}.")


def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder, its config.json, a GGUF file, a name on the hub, or a recipe: RECIPE.toml.",
        ),
    ],
    length: Annotated[
        int | None, typer.Option(min=1, max=2**24, help="Positions before the token whose cost is counted.")
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,N,…",
            help="Also count it with only the first heads of each layer: a number a layer, as 4,2,3; may be repeated.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, max=2**24, help="For a recipe: size of its vocabulary.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Also count it with this head plan applied.")] = None,
    latency: Annotated[
        Path | None, typer.Option(help="With --plan: predict the speed from the latency.json of a --speedup.")
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Also show the memory that it takes to train gates on it.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="With --training: rows in a batch, by default 8.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, max=2**24, help="With --training: tokens in a row, by default 256.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --training: recompute layers in the backward pass.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="With --training: mixed precision.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show layers × heads, parameters, FLOPs and key/value cache without loading the weights.

    For a recipe, show what its model will cost, next to the published numbers for models of that shape.
    """
    layouts = [_numbers(text) for text in heads or []]
    if latency is not None and plan is None:
        raise InputError("--latency predicts the speed of the model that a plan leaves; give the plan with --plan.")
    of_training = {
        "--batch-size": batch_size,
        "--sequence-length": sequence_length,
        "--gradient-checkpointing": gradient_checkpointing or None,
        "--bf16": bf16 or None,
    }
    unused = [option for option, value in of_training.items() if value is not None]
    if unused and not training:
        raise InputError(f"{unused[0]} is for the memory of training; add --training, or leave {unused[0]} out.")
    batch_size = batch_size or 8
    if model.suffix == ".toml":
        if plan is not None:
            raise InputError("--plan needs a model, but a recipe's model does not exist yet; leave out --plan.")
        if training:
            raise InputError("--training counts the memory of a model, but got a recipe; leave out --training.")
        load_torch(as_json)
        _inspect_recipe(model, length, layouts, vocab_size, as_json)
        return
    if vocab_size is not None:
        raise InputError("--vocab-size is for recipes, but a checkpoint has its own vocabulary; leave it out.")
    from deadhead.checkpoints.declared import has_gates
    from deadhead.checkpoints.folder_cost import folder_cost

    others: list[tuple[str, Cost]] = []
    asked: dict[str, Any] = {}
    # Some folders tell all that is to be known without torch.
    found = None if layouts or plan is not None or training else folder_cost(model, length=length)
    if found is None:
        load_torch(as_json, model)
        from deadhead.checkpoints.checkpoint import load_config

        config = load_config(model)
        found, others = _costs(config, length, layouts, plan)
        asked = {"layouts": [asdict(other) for _, other in others]} if others else {}
        if plan is not None and latency is not None:
            from deadhead.measure.latency import Latency

            asked["predicted_speedup"] = Latency.from_json(latency).speedup(HeadPlan.from_json(plan))
        if training:
            how = {"batch_size": batch_size, "sequence_length": sequence_length, "bf16": bf16}
            asked["training_memory"] = _training_memory(
                config, how | {"gradient_checkpointing": gradient_checkpointing}
            )
    cost, recorded = found
    is_gated = has_gates(model)
    if as_json:
        print_json({**asdict(cost), "gated": is_gated, **asked})
        return
    console.print(head_map_text(recorded or HeadPlan.keep_all(dict(enumerate(cost.total_heads)))))
    console.print(_cost_table(cost))
    if others:
        console.print(_layouts_table([("as it is", cost), *others]))
    if latency is not None:
        speedup = asked["predicted_speedup"]
        console.print(f"speed predicted from {escape(str(latency))}: {speedup:.2f} times that of the model as it is")
    if training:
        console.print(_memory_table(asked["training_memory"]))
        console.print(
            f"Memory in GB to train gates on {batch_size} rows at a time, within about 25 %. The total is the peak, "
            "less than the sum. Only tensors are counted; a process takes more, because its allocator wastes some."
        )
    if is_gated:
        console.print("The checkpoint was saved with gates on; deadhead.load_gated returns the model and its gates.")


def _costs(
    config: PreTrainedConfig, length: int | None, layouts: list[list[int]], plan: Path | None
) -> tuple[tuple[Cost, HeadPlan | None], list[tuple[str, Cost]]]:
    """Return a model's cost with the plan it was cut by, and its costs with other heads by the option naming them."""
    from deadhead.measure.cost import config_cost, first_heads

    plans = [("--heads", first_heads(config, counts)) for counts in layouts]
    if plan is not None:
        plans.append(("--plan", HeadPlan.from_json(plan)))
    recorded = getattr(config, "head_plan", None)
    found = config_cost(config, length=length), None if recorded is None else HeadPlan.from_dict(recorded)
    return found, [(option, config_cost(config, other, length=length)) for option, other in plans]


def _inspect_recipe(
    path: Path, length: int | None, layouts: list[list[int]], vocab_size: int | None, as_json: bool
) -> None:
    from deadhead.training.runs.recipe_cost import expected_vocabulary, recipe_costs

    recipe = load_recipe(path)
    costs = recipe_costs(recipe, vocab_size=vocab_size, length=length, layouts=layouts)
    tokens = vocab_size or expected_vocabulary(recipe.data)
    positions = length or recipe.model.memory_length
    if as_json:
        models = [{**asdict(cost), "interpolated": cost.heads is None} for cost in costs]
        print_json({"recipe": recipe.name, "vocab_size": tokens, "length": positions, "models": models})
        return
    console.print(_recipe_table(costs))
    console.print("Parameters are without embeddings and output layer; stated: as the models' authors count them.")
    if any(cost.heads is None for cost in costs):
        console.print("≈ the authors state no numbers of heads: interpolated by the share of the heads that is gone.")
    unknown = "without the output layer (its size is known only from the text; give it with --vocab-size)"
    part = unknown if tokens is None else f"with an output layer of {tokens:,} tokens"
    console.print(f"FLOPs are those of one token with {positions:,} tokens before it, {part}.")


def _recipe_table(costs: list[ShapeCost]) -> Table:
    table = _table("heads a layer", "gone", "parameters", "of heads", "FLOPs", "stated")
    for cost in costs:
        about = "≈" if cost.heads is None else ""
        flops = cost.layer_flops_per_token if cost.flops_per_token is None else cost.flops_per_token
        table.add_row(
            escape(cost.name),
            "" if cost.heads is None else _heads(cost.heads),
            f"{cost.sparsity:.0%}",
            f"{about}{_short(cost.parameters)}",
            f"{about}{_short(cost.head_parameters)}",
            f"{about}{_short(flops)}",
            "" if cost.stated_parameters is None else _short(cost.stated_parameters),
        )
    return table


def _cost_table(cost: Cost) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "heads": f"{sum(cost.heads)} of {sum(cost.total_heads)}",
        "parameters": f"{cost.parameters:,}",
        "  without embeddings and output layer": f"{cost.parameters - cost.embedding_parameters:,}",
        "  of the heads, removed with them": f"{cost.attention_parameters:,}",
        "FLOPs a token": f"{cost.flops_per_token:,.0f}",
        "  of the heads": f"{cost.attention_flops_per_token:,.0f}",
        "key/value cache a text, bytes": f"{cost.kv_cache_bytes:,}" if cost.kv_cache_bytes else "–",
    }
    if cost.total_hidden_units:
        rows["hidden units"] = f"{sum(cost.hidden_units):,} of {sum(cost.total_hidden_units):,}"
        rows["  of the hidden units, removed with them"] = f"{cost.hidden_parameters:,}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layouts_table(costs: list[tuple[str, Cost]]) -> Table:
    table = _table("heads a layer", "gone", "parameters", "of heads", "FLOPs")
    for name, cost in costs:
        table.add_row(
            name,
            _heads(cost.heads),
            f"{1 - sum(cost.heads) / sum(cost.total_heads):.0%}",
            _short(cost.parameters - cost.embedding_parameters),
            _short(cost.attention_parameters),
            _short(cost.flops_per_token),
        )
    return table


def _training_memory(config: PreTrainedConfig, how: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the memory of training for each choice of what learns that this model and this environment allow."""
    from deadhead.measure.cost import skeleton
    from deadhead.training.runs.training_memory import training_memory

    recipe = changed(PruneRecipe(blocks=False), **how)
    modes: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 16}, "frozen": {"freeze_weights": True}}
    if hasattr(config, "memory_length") or not is_installed("peft"):
        del modes["lora"]
    return {
        mode: asdict(training_memory(skeleton(config), changed(recipe, **learns))) for mode, learns in modes.items()
    }


def _memory_table(memory: dict[str, dict[str, int]]) -> Table:
    names = {"full": "all weights learn", "lora": "LoRA adapters learn", "frozen": "only gates learn"}
    table = _table("weights", "gradients", "optimizer", "activations", "total")
    for mode, found in memory.items():
        table.add_row(names[mode], *(f"{value / 1e9:,.2f}" for value in found.values()))
    return table


def _table(*columns: str) -> Table:
    # Without lines between the columns it fits into 80 characters.
    table = Table(box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _heads(counts: list[int]) -> str:
    """Write the heads of each layer in few characters: without separators if each number is a single digit."""
    if len(set(counts)) == 1:
        return f"{len(counts)} × {counts[0]}"
    return ("" if max(counts) < 10 else " ").join(map(str, counts))


def _short(value: float) -> str:
    if value < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:.2f}M" if value < 1e9 else f"{value / 1e9:.2f}G"


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--heads takes whole numbers with commas between, one a layer, but got {text!r}.") from None
