"""The number of a model's positions, and whether a text fits into them."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.models.pruned.structure import text_stack

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
# What models call a table of one vector for each position.
_TABLE = re.compile(r"(wpe|position_embeddings?|embed_positions|positions_embed)$")


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model, or None if its configuration does not give it."""
    config = model.config.get_text_config()
    declared = next((n for name in _POSITIONS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    # Of what is declared RoBERTa leaves the first rows of its table unused.
    return declared if declared is None else min([declared, *_table_rows(model)])


def require_positions(model: PreTrainedModel, length: int, *, of: str) -> None:
    """Check that a model that looks up positions in a table has one for each of `length` tokens.

    Models that compute positions, by rotations for example, can run on longer texts than they were trained on.

    Raises:
        InputError: the model has fewer positions; the message calls the text `of`.
    """
    rows = _table_rows(model)
    if rows and length > min(rows):
        raise InputError(
            f"{of} would have {length:,} tokens, but the model, a {type(model).__name__}, has {min(rows):,} positions; "
            "ask for no more."
        )


def _table_rows(model: PreTrainedModel) -> list[int]:
    """Return how many positions each table of positions in the part that reads text has."""
    # Models that read images or sound have tables too, but of patches or frames.
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return []
    rows = []
    for name, module in text_stack(model).named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name):
            # OPT and RoBERTa begin behind rows that stand for no position.
            unused = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            rows.append(module.num_embeddings - int(unused))
    # Rotations that are looked up, not computed (GPT-J, CodeGen), and a table that no embedding holds (CTRL).
    buffers = text_stack(model).named_buffers()
    return rows + [len(values) for name, values in buffers if name.endswith(("embed_positions", "pos_encoding"))]
