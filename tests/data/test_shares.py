"""Who reads which batch, and rows of several put one behind the other."""

from __future__ import annotations

import pytest
import torch

from deadhead.data.shares import ALONE, Dealing, Shares
from tests.threads import shared_by


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[8] * 3, [8] * 7, [4, 4, 4, 2, 2] * 6, [1, 9, 1, 1, 9], [3], []])
def test_every_batch_is_one_processs_own_and_all_have_about_as_much(count: int, sizes: list[int]) -> None:
    dealings = [Dealing(count, index) for index in range(count)]
    shares = [0] * count
    for size in sizes:
        own = [dealing.is_own(size) for dealing in dealings]
        assert sum(own) == 1
        shares[own.index(True)] += size
    assert max(shares) - min(shares) <= max(sizes, default=0)
    # None waits for its first while another has its second.
    assert sum(share > 0 for share in shares) == min(count, len(sizes))


@pytest.mark.parametrize("lengths", [[2], [0, 3], [4, 0, 1], [0, 0]])
def test_rows_of_all_processes_come_one_behind_the_other(lengths: list[int]) -> None:
    whole = torch.randn(sum(lengths), 2, 3)
    parts = whole.split(lengths)
    for found in shared_by(len(lengths), lambda shares: shares.joined(parts[shares.index])):
        assert torch.equal(found, whole)


def test_what_one_process_alone_has_is_all_there_is() -> None:
    values = torch.arange(3.0)
    ALONE.total(values)
    assert torch.equal(values, torch.arange(3.0)) and ALONE.joined(values) is values
    assert ALONE.undivided() is ALONE and ALONE.of_main(lambda: 7) == ALONE.agreed(7) == 7
    assert ALONE.any(True) and not ALONE.any(False)


def test_all_processes_hear_what_is_true_in_one() -> None:
    def tell(shares: Shares) -> tuple[bool, bool]:
        return shares.any(shares.index == 2), shares.any(False)

    assert shared_by(3, tell) == [(True, False)] * 3
