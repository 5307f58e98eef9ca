"""What was asked for of a budget, and what was reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deadhead.budget import BUDGET_NAMES


def budget_sentence(budget: Mapping[str, Any]) -> str:
    """Return one sentence.

    Args:
        budget: kind, what was asked for and what was reached, as in a run's summary.
    """
    kind, asked, reached = budget["kind"], budget["asked"], budget["reached"]
    if kind == "speedup":
        return f"Asked for {asked:g} times the speed; measured {reached:.3f} times."
    if kind == "sparsity":
        return f"Asked to cut {asked:.1%} of the heads; {reached:.1%} are gone."
    return f"Asked to leave {asked:.1%} of the {BUDGET_NAMES[kind]}; {reached:.2%} are left."
