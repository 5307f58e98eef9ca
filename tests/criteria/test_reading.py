"""A text that several read: scores are those of one that reads all of it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from deadhead.criteria.reading import WholeReading
from deadhead.criteria.scoring import score_heads
from deadhead.data.shares import Shares
from deadhead.errors import InputError
from deadhead.plans.kinds import READS_TEXT, OneShot
from deadhead.plans.plan import UnitKey
from tests.criteria.models import STOCK, llama
from tests.threads import shared_by


def text() -> list[dict[str, Tensor]]:
    """Three batches of different length, in which some tokens do not count, and in a row of each none."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for rows, length in ((3, 9), (2, 5), (4, 7)):
        counts = torch.rand(rows, length, generator=generator) < 0.6
        counts[0, :4] = True
        counts[1] = False
        found.append({"input_ids": torch.randint(29, (rows, length), generator=generator), "scored": counts})
    return found


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama, groups"])
@pytest.mark.parametrize("criterion", READS_TEXT)
def test_scores_of_a_text_that_is_shared_out(criterion: OneShot, name: str, count: int) -> None:
    make, unit = STOCK[name]
    model = make().double()
    models = [copy.deepcopy(model) for _ in range(count)]

    def scores(model: Any, shares: Shares | None = None) -> dict[UnitKey, Tensor]:
        given = {} if shares is None else {"shares": shares}
        # Batches that come once: a criterion may read them again.
        return dict(score_heads(model, criterion, iter(text()), unit=unit, blocks=4, **given).scores)

    whole = scores(model)
    found = shared_by(count, lambda shares: scores(models[shares.index], shares))
    for each in found:
        assert each.keys() == whole.keys()
        for key, values in each.items():
            assert torch.equal(values, found[0][key])
            torch.testing.assert_close(values, whole[key], rtol=1e-4, atol=1e-7, check_dtype=True)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_batch_is_read_by_one(count: int) -> None:
    models = [llama() for _ in range(count)]

    def read(shares: Shares) -> list[list[int]]:
        reading = WholeReading(models[shares.index], iter(text()), shares)
        return [[inputs["input_ids"].numel() for _, inputs in reading.over()] for _ in range(2)]

    first, again = zip(*shared_by(count, read), strict=True)
    assert first == again
    assert sorted(chain(*first)) == sorted(batch["input_ids"].numel() for batch in text())


def test_no_text_is_told_by_all() -> None:
    models = [llama() for _ in range(2)]

    def read(shares: Shares) -> str:
        with pytest.raises(InputError) as caught:
            score_heads(models[shares.index], "taylor", [], shares=shares)
        return str(caught.value)

    assert shared_by(2, read) == ["This criterion needs text, but got no batch; give it batches."] * 2
