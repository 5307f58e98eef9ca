"""Blocks: hidden units of a layer that one gate opens and closes, or that go or stay together in a ranking.

The order of hidden units means nothing, so a block may hold any of them: a run of neighbours, or units of like scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deadhead.errors import InputError
from deadhead.plans.unit_plan import Layer

Blocks = Mapping[Layer, Sequence[Sequence[int]]]
"""By layer, the hidden units of each block, in the dense model's numbering; each unit there is belongs to one block."""

# Matrices whose sides are multiples of 64 or 128 are the fastest; for units that are sorted by score 32 is enough.
LARGEST_RUN, LARGEST_SORTED = 128, 32
# A block has at most an eighth of a layer, so that its width can be chosen finely enough.
_FEWEST_BLOCKS = 8
_LEAST_COMMON = 16


def choose_block_size(widths: Iterable[int], asked: int | None, *, largest: int = LARGEST_RUN) -> int:
    """Return the block size for layers of these widths: `asked`, unless it is None.

    By default it is the largest power of two that divides all widths, up to `largest` and an eighth of a layer. If
    there is none above `_LEAST_COMMON`, as after an earlier cut, the size need not divide all widths.

    Raises:
        InputError: `asked` is larger than every layer, or not above 0.
    """
    widths = [width for width in widths if width]
    if asked is None:
        common, most = math.gcd(*widths), 1
        while 2 * most <= largest and 2 * most * _FEWEST_BLOCKS <= min(widths, default=0):
            most *= 2
        return max(min(most, common & -common), min(most, _LEAST_COMMON))
    if asked < 1 or (widths and asked > max(widths)):
        raise InputError(
            f"The block size must lie between 1 and the width of the layers, {max(widths, default=1)}, but it is "
            f"{asked}; {choose_block_size(widths, None, largest=largest)} would do."
        )
    return asked


def runs(units: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Return the units of a layer in blocks of `size` neighbours; the last block has the rest."""
    return [tuple(units[start : start + size]) for start in range(0, len(units), size)]


def sorted_blocks(units: Sequence[int], scores: Tensor, size: int) -> list[tuple[int, ...]]:
    """Return the units of a layer in blocks of like scores, the lowest first.

    If `size` does not divide the units, the first block has the rest, so that multiples of `size` stay when blocks go.
    """
    order = [units[place] for place in scores.argsort(stable=True).tolist()]
    left = len(order) % size
    return [*([tuple(order[:left])] if left else []), *runs(order[left:], size)]


def owners(units: Sequence[int], blocks: Sequence[Sequence[int]]) -> Tensor:
    """Return the index of the block of each of a layer's units, in their order, (F,), int64.

    Raises:
        InputError: a unit is in no block or in two, or a block has a unit that the layer does not have.
    """
    there = set(units)
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for unit in block:
            if unit not in there or unit in owner:
                why = "is in two blocks" if unit in there else "is not one of this layer's"
                raise InputError(f"Every hidden unit of a layer must be in one block, but {unit} {why}.")
            owner[unit] = index
    if missing := [unit for unit in units if unit not in owner]:
        raise InputError(f"Every hidden unit of a layer must be in one block, but {missing[0]} is in none.")
    return torch.tensor([owner[unit] for unit in units], dtype=torch.long)
