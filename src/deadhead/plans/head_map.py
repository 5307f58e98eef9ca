"""The head map in characters: layers × heads, kept and cut."""

from __future__ import annotations

from deadhead.plans.plan import HeadPlan
from deadhead.plans.unit_plan import Layer


def head_map_text(plan: HeadPlan) -> str:
    """Return the head map as text, one line a layer: ■ a head that stays, · one that goes; hidden units are counted."""
    hidden = {} if plan.hidden_units is None else plan.hidden_units.total
    layers = [*plan.total, *(layer for layer in hidden if layer not in plan.total)]
    width = max(len(str(layer)) for layer in layers)
    lines = []
    for layer in layers:
        count = plan.total.get(layer, 0)
        kept = set(plan.kept.get(layer, ()))
        row = " ".join("■" if head in kept else "·" for head in range(count))
        lines.append(f"layer {layer!s:>{width}}  {row}  {count_text(plan, layer)}".rstrip())
    return "\n".join(lines)


def count_text(plan: HeadPlan, layer: Layer) -> str:
    """Return how many of a layer's heads and hidden units the plan keeps, as text."""
    parts = [f"{len(plan.kept[layer])}/{plan.total[layer]}"] if layer in plan.total else []
    if plan.hidden_units is not None and layer in plan.hidden_units.total:
        parts.append(f"hidden units {len(plan.hidden_units.kept[layer])}/{plan.hidden_units.total[layer]}")
    return ", ".join(parts)
