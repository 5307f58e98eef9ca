"""`deadhead cut` and `deadhead inspect`: a model and its head plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deadhead.cli.console import AsJson, Model, console, print_json
from deadhead.errors import InputError


def cut(
    model: Model,
    plan: Annotated[Path, typer.Option("--plan", help="The head plan, a JSON file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the cut model.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Cut a model by a head plan that was made elsewhere."""
    from deadhead import checkpoint
    from deadhead.cost import model_cost
    from deadhead.cutting import cut as cut_heads
    from deadhead.data import load_tokenizer
    from deadhead.plan import HeadPlan
    from deadhead.report.head_map import head_map_text

    head_plan = HeadPlan.from_json(plan)
    if out.resolve() == model.resolve():
        raise InputError(f"The cut model must not overwrite the model it is made of, {model}; choose another --out.")
    network = checkpoint.load(model)
    before = model_cost(network, unit=head_plan.unit)
    cut_heads(network, head_plan)
    has_tokenizer = not model.is_dir() or (model / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(model) if has_tokenizer else None
    checkpoint.save(network, out, tokenizer=tokenizer, base=model)
    after = model_cost(network)
    if as_json:
        print_json({"before": asdict(before), "after": asdict(after)})
        return
    console.print(head_map_text(head_plan))
    console.print(
        f"{escape(str(out))}: {before.parameters:,} → {after.parameters:,} parameters, "
        f"{before.flops_per_token:,.0f} → {after.flops_per_token:,.0f} FLOPs a token"
    )


def inspect(
    model: Model,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Positions before the token that is counted.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show layers × heads, parameters, FLOPs and key/value cache, without loading the weights."""
    from deadhead import checkpoint
    from deadhead.cost import config_cost
    from deadhead.gate_files import has_gates
    from deadhead.plan import HeadPlan
    from deadhead.report.head_map import head_map_text

    try:
        config = checkpoint.load_config(model)
        cost = config_cost(config, length=length)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
        raise InputError(f"The configuration in {model} cannot be used: {reason}.") from error
    gated = has_gates(model)
    if as_json:
        print_json({**asdict(cost), "gated": gated})
        return
    recorded = getattr(config, "head_plan", None)
    plan = HeadPlan.keep_all(dict(enumerate(cost.total_heads))) if recorded is None else HeadPlan.from_dict(recorded)
    console.print(head_map_text(plan))
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "heads": f"{sum(cost.heads)} of {sum(cost.total_heads)}",
        "parameters": f"{cost.parameters:,}",
        "  without embeddings and output layer": f"{cost.parameters - cost.embedding_parameters:,}",
        "  of the heads, which go with them": f"{cost.attention_parameters:,}",
        "FLOPs a token": f"{cost.flops_per_token:,.0f}",
        "  of the heads": f"{cost.attention_flops_per_token:,.0f}",
        "key/value cache a text, bytes": f"{cost.kv_cache_bytes:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if gated:
        console.print("The checkpoint was saved with gates on; deadhead.load_gated gives model and gates.")
