"""Terminal output for a run: the table of its stages, that of a dry run, and sentences on what was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from deadhead.plans.memory_sizes import size_text
from deadhead.training.runs.summary import STAGES

if TYPE_CHECKING:
    from deadhead.training.recipes.recipe import PruneRecipe
    from deadhead.training.runs.dry_run import DryRun
    from deadhead.training.runs.forecast import Part

_LEFT_OF = {"params": "parameters", "flops": "FLOPs a token", "kv_cache": "key/value cache"}


def budget_sentence(budget: Mapping[str, Any], *, predicted: bool = False) -> str:
    """Return a sentence on the budget that was asked for and reached, or would be reached if nothing is cut yet."""
    kind, asked, reached = budget["kind"], budget["asked"], budget["reached"]
    if kind == "speedup":
        return f"Asked for {asked:g} times the speed; {'predicted' if predicted else 'measured'} {reached:.3f} times."
    verb = "would be" if predicted else "are"
    if kind == "memory":
        took = "would be" if predicted else "is"
        return f"Asked for {size_text(asked)} of memory; what is left {took} {size_text(reached)}."
    if kind == "sparsity":
        return f"Asked to cut {asked:.1%} of the heads; {reached:.1%} {verb} gone."
    what = "parameters of the blocks" if budget.get("of") == "blocks" else _LEFT_OF[kind]
    return f"Asked to leave {asked:.1%} of the {what}; {reached:.2%} {verb} left."


def forecast_sentence(parts: Sequence[Part], free: int) -> str:
    """Return a sentence on the steps of pruning, how long they may take, and how much memory.

    Args:
        parts: the parts of pruning.
        free: free memory, in bytes.
    """
    *first, last = [f"{part.what} ({_duration(part.seconds)}, {_size(part.memory)} of memory)" for part in parts]
    doing = f"{', '.join(first)}, then {last}" if first else last
    total = _duration(sum(part.seconds for part in parts))
    told = f"To do: {doing}; {total} in total on this machine, without reading the text and measuring on it."
    largest = max(parts, key=lambda part: part.memory)
    if largest.memory > free:
        told += f" Only {_size(free)} of memory are free; to use less, {largest.remedy}."
    return told


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def stages_table(summary: Mapping[str, Any]) -> Table:
    """Return a table of a run's summary: dense, gated, cut, fine-tuned and, if there is one, the dense control."""
    table = Table(title="What was cut, and what it cost", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("steps", "heads", "parameters", "MFLOP/tok", "perplexity", "bits/byte", "tokens/s"):
        # Where the terminal is narrow the list of heads is folded; numbers would be cut off.
        table.add_column(name, justify="right", no_wrap=name != "heads")
    for stage in (*STAGES, "control"):
        if stage not in summary:
            continue
        values = summary[stage]
        table.add_row(
            stage,
            f"{values['steps']:,}",
            _units(values),
            f"{values['parameters']:,}",
            f"{values['flops_per_token'] / 1e6:.3f}",
            _number(values["perplexity"]),
            _number(values["bits_per_byte"]),
            f"{values['tokens_per_second']:,.0f}",
        )
    captions = []
    if "control" in summary:
        captions.append("control: the dense model, trained for as many steps in total as the pruned one")
    if any(summary.get(stage, {}).get("hidden_units") for stage in STAGES):
        captions.append("heads | hidden units or persistent vectors, each one number a layer")
    table.caption = "; ".join(captions) or None
    return table


def _units(values: Mapping[str, Any]) -> str:
    heads = " ".join(str(count) for count in values["heads"])
    hidden = " ".join(str(count) for count in values.get("hidden_units", ()))
    return f"{heads} | {hidden}" if hidden else heads


def _number(value: float | None) -> str:
    # A summary has null for a number that is not finite.
    return "∞" if value is None else f"{value:.3f}"


def verdict(summary: Mapping[str, Any]) -> str:
    """Return a few lines on gains and losses: heads, FLOPs against measured speed, perplexity against the control."""
    dense, final = summary["dense"], summary["finetuned"]
    gone = 1 - sum(final["heads"]) / max(sum(dense["heads"]), 1)
    flops = 1 - final["flops_per_token"] / dense["flops_per_token"]
    speedup = final["tokens_per_second"] / dense["tokens_per_second"]
    possible = dense["flops_per_token"] / final["flops_per_token"]
    lines = [
        f"{gone:.0%} of the heads and {1 - final['parameters'] / dense['parameters']:.0%} of the parameters are gone.",
        f"{flops:.0%} of the FLOPs are gone, which allows {possible:.2f} times the speed; "
        f"measured: {speedup:.2f} times (efficiency {speedup / possible:.2f}).",
    ]
    if "budget" in summary:
        lines.append(budget_sentence(summary["budget"]))
    if "control" in summary and final["perplexity"] and (control := summary["control"]["perplexity"]):
        change = final["perplexity"] / control - 1
        side = "equal to" if abs(change) < 5e-4 else f"{abs(change):.1%} {'above' if change > 0 else 'below'}"
        lines.append(
            f"Perplexity {final['perplexity']:.3f}, {side} the "
            f"{control:.3f} of the dense model trained for as many steps."
        )
    return "\n".join(lines)


def dry_run_table(found: DryRun, recipe: PruneRecipe) -> Table:
    """Return a table of what a phase would do: the model as it is, an example after pruning, and without any unit."""
    table = Table(box=None, pad_edge=False)
    titles = {"as it is": "dense", "for instance": "pruned", "without any": "least"}
    columns = {title: found.costs[name] for title, name in titles.items() if name in found.costs}
    table.add_column("")
    for title in columns:
        table.add_column(title, justify="right")
    kept = columns.values()
    table.add_row(f"{found.unit.replace('kv_group', 'key/value group')}s", *(str(sum(cost.heads)) for cost in kept))
    if found.block_size is not None:
        table.add_row("hidden units", *(str(sum(cost.hidden_units)) for cost in kept))
    table.add_row("parameters", *(f"{cost.parameters:,}" for cost in kept))
    table.add_row(f"FLOPs a token after {found.length:,}", *(f"{cost.flops_per_token:,.0f}" for cost in kept))
    if any(cost.kv_cache_bytes for cost in kept):
        table.add_row("key/value cache, bytes", *(f"{cost.kv_cache_bytes:,}" for cost in kept))
    lines = []
    if recipe.budget is not None:
        asked = {**recipe.budget.words, "reached": found.reached}
        lines.append(budget_sentence(asked, predicted=True))
    if (memory := found.memory) is not None:
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
