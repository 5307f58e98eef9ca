"""What was asked for of a budget, and what was reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {"params": "parameters", "flops": "FLOPs a token", "kv_cache": "key/value cache"}


def budget_sentence(budget: Mapping[str, Any], *, predicted: bool = False) -> str:
    """Return one sentence.

    Args:
        budget: kind, what was asked for and what was reached, as in a run's summary.
        predicted: whether nothing was cut yet.
    """
    kind, asked, reached = budget["kind"], budget["asked"], budget["reached"]
    if kind == "speedup":
        return f"Asked for {asked:g} times the speed; {'predicted' if predicted else 'measured'} {reached:.3f} times."
    verb = "would be" if predicted else "are"
    if kind == "sparsity":
        return f"Asked to cut {asked:.1%} of the heads; {reached:.1%} {verb} gone."
    return f"Asked to leave {asked:.1%} of the {_NAMES[kind]}; {reached:.2%} {verb} left."
