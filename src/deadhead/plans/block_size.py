"""The size of the blocks that hidden units, or persistent vectors, are cut in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deadhead.errors import InputError
from deadhead.plans.plan import BlockPlan

_LARGEST_BLOCK = 128
# So that a layer's width can be chosen in steps of an eighth at most.
_FEWEST_BLOCKS = 8


def choose_block_size(widths: Sequence[int], asked: int | None, recorded: BlockPlan | None) -> int:
    """Return the size of the blocks of layers of these widths, in the dense model: as asked for, or as they were cut.

    Else it is the largest power of two that divides all widths, up to 128 and an eighth of a layer; matrices whose
    sides are multiples of 64 or 128 are the fastest.

    Raises:
        InputError: the size does not divide a width, or is not the one that the model was cut by.
    """
    if recorded is not None:
        if asked not in (None, recorded.size):
            raise InputError(
                f"This model was cut in blocks of {recorded.size}, but a block size of {asked} was asked for; leave it "
                "out."
            )
        return recorded.size
    if asked is None:
        common = math.gcd(*widths)
        power = common & -common
        while power > 1 and (power > _LARGEST_BLOCK or power * _FEWEST_BLOCKS > min(widths)):
            power //= 2
        return power
    if asked < 1 or any(width % asked for width in widths):
        raise InputError(
            f"The block size must divide the width of every layer, {sorted(set(widths))}, but it is {asked}; "
            f"{choose_block_size(widths, None, None)} would do."
        )
    return asked
