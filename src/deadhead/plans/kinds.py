"""The words that say how units are chosen. Recipes and the command line take them from here without torch."""

from __future__ import annotations

from typing import Literal, get_args

Ranking = Literal["global", "layer"]
OneShot = Literal["magnitude", "taylor", "output-difference", "random"]
ONE_SHOT: tuple[OneShot, ...] = get_args(OneShot)
BudgetKind = Literal["sparsity", "params", "flops", "kv_cache", "speedup"]
Of = Literal["all", "blocks"]
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
