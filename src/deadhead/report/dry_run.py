"""The table of a dry run."""

from __future__ import annotations

from rich.table import Table

from deadhead.report.budget import budget_sentence
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.dry_run import DryRun


def dry_run_table(found: DryRun, recipe: PruneRecipe) -> Table:
    """Return the model as it is, for instance once it is pruned, and without any unit, side by side.

    Args:
        found: what the phase would do.
        recipe: the phase.
    """
    table = Table(box=None, pad_edge=False)
    titles = {"as it is": "dense", "for instance": "pruned", "without any": "least"}
    columns = {title: found.costs[name] for title, name in titles.items() if name in found.costs}
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    kept = columns.values()
    table.add_row(f"{found.unit.replace('kv_group', 'key/value group')}s", *(str(sum(cost.heads)) for cost in kept))
    if found.block_size is not None:
        table.add_row(f"blocks of {found.block_size}", *(str(sum(cost.blocks)) for cost in kept))
    table.add_row("parameters", *(f"{cost.parameters:,}" for cost in kept))
    table.add_row(f"FLOPs a token after {found.length:,}", *(f"{cost.flops_per_token:,.0f}" for cost in kept))
    table.add_row("key/value cache, bytes", *(f"{cost.kv_cache_bytes:,}" for cost in kept))
    lines = []
    if recipe.budget is not None:
        asked = {"kind": recipe.budget.kind, "asked": recipe.budget.value, "reached": found.reached}
        lines.append(budget_sentence(asked, predicted=True))
    memory = found.memory
    parts = ", ".join(f"{name} {_size(getattr(memory, name))}" for name in ("weights", "gradients", "optimizer"))
    lines.append(
        f"Memory to train gates on {recipe.batch_size} rows at once: {_size(memory.total)} ({parts}, activations "
        f"{_size(memory.activations)})."
    )
    table.caption = "\n".join(lines)
    table.caption_justify = "left"
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
