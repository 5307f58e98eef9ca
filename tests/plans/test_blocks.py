"""Hidden units in blocks: sizes, orders, and which block each unit is in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deadhead.errors import InputError
from deadhead.plans.blocks import choose_block_size, owners, runs, sorted_blocks


def test_sizes_that_are_chosen() -> None:
    assert choose_block_size([14_336, 14_336], None) == 128
    assert choose_block_size([14_336, 96], None, largest=32) == 8
    assert choose_block_size([5, 0], None) == 1
    # What an earlier cut by single units left has no size in common.
    assert choose_block_size([999, 1003], None) == 16
    assert choose_block_size([1536, 1504], None) == 32
    assert choose_block_size([12, 7], 12) == 12
    with pytest.raises(InputError, match="between 1 and the width of the layers, 12, but it is 13; 1 would do"):
        choose_block_size([12, 7], 13)


def test_what_is_left_over_is_last_in_runs_and_first_by_scores() -> None:
    assert runs([0, 2, 3, 5, 9], 2) == [(0, 2), (3, 5), (9,)]
    assert sorted_blocks([0, 2, 3, 5, 9], torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), 2) == [(2,), (5, 9), (3, 0)]
    assert runs([], 2) == sorted_blocks([], torch.empty(0), 2) == []


def test_the_block_of_each_unit() -> None:
    found = owners([0, 2, 5, 9], [(9, 0), (2,), (5,)])
    assert found.tolist() == [0, 1, 2, 0] and found.dtype == torch.long
    assert owners([], []).shape == (0,) and owners([], []).dtype == torch.long


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(0,), (5,)], "but 2 is in none"),
        ([(0, 2), (5, 0)], "but 0 is in two blocks"),
        ([(0, 2), (5, 7)], "but 7 is not one of this layer's"),
    ],
)
def test_blocks_that_are_none(blocks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        owners([0, 2, 5], blocks)
