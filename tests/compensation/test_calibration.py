"""Which rows are held out, and which a process reads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from deadhead.compensation.calibration import Calibration, divided, held_out_loss
from deadhead.data.shares import Shares
from tests.compensation.small_pairs import VOCABULARY, dense_model, text_of
from tests.threads import shared_by


def text(rows: int, length: int = 6) -> list[dict[str, Tensor]]:
    """Batches of five rows, the last perhaps of fewer, in which some tokens do not count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    counts = torch.rand(rows, length, generator=generator) < 0.7
    return [{"input_ids": some, "scored": scored} for some, scored in zip(ids.split(5), counts.split(5), strict=True)]


def rows_of(calibration: Calibration) -> Counter[tuple[tuple[int, ...], bool]]:
    """Return how often each row comes, held out or not."""
    pairs = zip(calibration.batches, calibration.is_held, strict=True)
    return Counter((tuple(row.tolist()), held) for batch, held in pairs for row in batch["input_ids"])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_rows_that_are_held_out_do_not_depend_on_the_processes(count: int) -> None:
    model, batches = dense_model("llama"), text(33)
    parts = shared_by(count, lambda shares: divided(model, batches, shares))
    found = sum((rows_of(part) for part in parts), Counter())
    every = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert found == Counter((row, place % 8 == 1) for place, row in enumerate(every))
    assert all(part.batches for part in parts)
    assert {part.held_tokens for part in parts} == {6 * 4}


def test_where_there_is_too_little_or_a_memory_each_process_reads_everything() -> None:
    ours = dense_model("all-attention")
    for model, batches, count in ((dense_model("llama"), text(2), 3), (ours, text_of(ours, rows=2), 2)):
        alone = divided(model, batches)
        for part in shared_by(count, lambda shares, m=model, b=batches: divided(m, b, shares)):  # type: ignore[misc]
            assert rows_of(part) == rows_of(alone) and part.shares.count == 1


@torch.no_grad()
def test_the_held_out_loss_is_a_mean_over_the_tokens_of_all_processes() -> None:
    models = [dense_model("llama") for _ in range(3)]
    batches = text(33)

    def loss(shares: Shares) -> float:
        with torch.no_grad():
            return held_out_loss(models[shares.index], divided(models[shares.index], batches, shares))

    found = shared_by(3, loss)
    assert found[0] == found[1] == found[2] == pytest.approx(held_out_loss(models[0], divided(models[0], batches)))
