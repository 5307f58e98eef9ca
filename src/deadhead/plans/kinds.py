"""The words that say how units are chosen. Recipes and the command line take them from here without torch."""

from __future__ import annotations

from typing import Literal, get_args

Ranking = Literal["global", "layer"]
OneShot = Literal[
    "magnitude", "taylor", "output-difference", "wanda", "flap", "second-order", "reconstruction", "influence", "random"
]
ONE_SHOT: tuple[OneShot, ...] = get_args(OneShot)
# Criteria that need text.
READS_TEXT: tuple[OneShot, ...] = tuple(name for name in ONE_SHOT if name not in ("magnitude", "random"))
# The criterion that keeps the most quality over all sizes of a real model (docs/llm.md).
FAST: OneShot = "reconstruction"
# How units are chosen: by learned gates or subsets of a given size, or by learned sizes of sublayers and a ranking.
Criterion = Literal["gates", "topk", "sizes", OneShot]
# Criteria whose scores only order units: they are not a loss that could be summed over units or divided by a cost.
STANDARDISED: tuple[OneShot, ...] = ("wanda", "flap", "random")
# Shares of the dense model's cost; for memory, bytes.
BudgetKind = Literal["sparsity", "params", "flops", "kv_cache", "memory", "speedup"]
Of = Literal["all", "blocks"]
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
