"""PEFT's tables of which modules of a model's type get adapters: ours get what transformers' type has."""

from __future__ import annotations

import sys

_TABLES = "TRANSFORMERS_MODELS_TO_"


def tell_peft(stock: str, ours: str) -> None:
    """Enter a type of cut models beside transformers' type in PEFT's tables, if PEFT was imported; it is not here."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in list(vars(constants).items()) if constants is not None else ():
        if name.startswith(_TABLES) and isinstance(table, dict) and stock in table:
            table.setdefault(ours, table[stock])
