"""The words that say how units are chosen. Recipes and the command line take them from here without torch."""

from __future__ import annotations

from typing import Literal, get_args

Ranking = Literal["global", "layer"]
OneShot = Literal[
    "magnitude", "taylor", "output-difference", "wanda", "flap", "second-order", "reconstruction", "influence", "random"
]
ONE_SHOT: tuple[OneShot, ...] = get_args(OneShot)
# Those that look at text.
READS_TEXT: tuple[OneShot, ...] = tuple(name for name in ONE_SHOT if name not in ("magnitude", "random"))
# The one that leaves most, over all sizes of a real model (docs/llm.md).
FAST: OneShot = "reconstruction"
# How units are chosen: gates, or subsets of a given size, learn it; sizes of sublayers are learned, and units ranked.
Criterion = Literal["gates", "topk", "sizes", OneShot]
# Those whose scores are an order of all units, but no loss: none that is shared out among units, or divided by a cost.
STANDARDISED: tuple[OneShot, ...] = ("wanda", "flap", "random")
# Shares of the dense model's; of memory the bytes themselves.
BudgetKind = Literal["sparsity", "params", "flops", "kv_cache", "memory", "speedup"]
Of = Literal["all", "blocks"]
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
