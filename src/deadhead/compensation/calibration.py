"""Calibration text: the batches that projections are fitted to, held-out batches, and a model's error on those."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.data.shares import ALONE, Shares
from deadhead.errors import InputError
from deadhead.layouts.inputs import run, runner
from deadhead.measure.losses import SegmentLoss
from deadhead.models.pruned.structure import text_stack

# One of this many rows (batches, with segment memory) is held out, beginning with the second: two are enough.
_HELD_OUT_OF = 8
# Tokens that run at once, unless a row is longer, and tokens whose logits are held at a time.
_MOST_TOKENS, _MOST_LOGITS = 1024, 256


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The part of a text that a process reads: batches in the text's order, some of them held out.

    Args:
        batches: the batches of this process.
        is_held: whether each batch is held out.
        has_memory: whether the model has segment memory.
        held_tokens: number of held-out tokens of all processes; infinite if the inputs are not text.
        shares: the shares of the processes that read the text together.
    """

    batches: list[dict[str, Tensor]]
    is_held: list[bool]
    has_memory: bool
    held_tokens: float = 0.0
    shares: Shares = ALONE

    @property
    def held(self) -> list[dict[str, Tensor]]:
        """The batches that are held out."""
        return [batch for batch, is_held in zip(self.batches, self.is_held, strict=True) if is_held]


def divided(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], shares: Shares = ALONE) -> Calibration:
    """Hold out every eighth row of some batches, or every eighth batch for a model with segment memory.

    The held-out rows do not depend on the number of processes. Each process reads its share of the rows. It reads all
    rows if the model has segment memory, or if there are too few rows for all processes.

    Raises:
        InputError: there are fewer than two rows, or batches.
    """
    has_memory = hasattr(model.config, "memory_length")
    found: list[dict[str, Tensor]] = []
    is_held: list[bool] = []
    row = 0
    for given in batches:
        batch = dict(given)
        if has_memory:
            found.append(batch)
            is_held.append(len(found) % _HELD_OUT_OF == 2)
            continue
        rows = torch.arange(row, row + len(next(iter(batch.values()))))
        row += len(rows)
        for part in (False, True):
            of_part = ((rows % _HELD_OUT_OF == 1) == part).nonzero().flatten().to(next(iter(batch.values())).device)
            if len(of_part):
                parts = [*_parts({name: value[of_part] for name, value in batch.items()}, _MOST_TOKENS)]
                found += parts
                is_held += [part] * len(parts)
    if len(set(is_held)) < 2:
        what = "batches" if has_memory else "rows of text"
        raise InputError(
            f"Compensation fits to some {what} and is judged on others, so at least 2 are needed, but "
            f"got {len(found) if has_memory else row}."
        )
    sizes = [batch["input_ids"].numel() if "input_ids" in batch else math.inf for batch in found]
    if has_memory or len(found) < shares.count:
        shares = shares.undivided()
    dealing = shares.dealing()
    # Inputs that are not text all count the same.
    is_own = [dealing.is_own(int(size) if size < math.inf else 1) for size in sizes]
    own = [{name: value.to(model.device) for name, value in batch.items()} for batch in compress(found, is_own)]
    return Calibration(
        batches=own,
        is_held=[*compress(is_held, is_own)],
        has_memory=has_memory,
        held_tokens=sum(compress(sizes, is_held)),
        shares=shares,
    )


def run_stack(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Run the part of a model that contains its layers, and return its last hidden states."""
    if not model.can_generate():
        return run(runner(model), batch)[0]
    return run(text_stack(model), {"input_ids": batch["input_ids"], "use_cache": False})[0]


def held_out_loss(
    model: PreTrainedModel, calibration: Calibration, begin: Callable[[int, int], None] = lambda batch, row: None
) -> float:
    """Return the mean negative log-likelihood of a held-out token, in nats.

    Before the model runs on some rows of a batch, `begin` is called with the indices of the batch and the first row.
    """
    loss = SegmentLoss(model)
    loss.try_out()
    total = tokens = 0.0
    # A held-out batch's memory is the text before it.
    pairs = [*zip(calibration.batches, calibration.is_held, strict=True)]
    pairs = pairs if calibration.has_memory else [(batch, True) for batch in calibration.held]
    for index, (batch, is_held) in enumerate(pairs):
        row = 0
        for part in [batch] if calibration.has_memory else _parts(batch, _MOST_LOGITS):
            begin(index, row)
            row += len(part["input_ids"])
            mean = loss(model, part).loss
            if is_held and (count := _scored(part, calibration.has_memory)):
                total, tokens = total + float(mean) * count, tokens + count
    sums = torch.tensor([total, tokens], dtype=torch.float64)
    calibration.shares.total(sums)
    return float(sums[0] / sums[1].clamp(min=1))


def held_out_states(model: PreTrainedModel, calibration: Calibration) -> list[Tensor]:
    """Return the last hidden states of held-out batches, for models that do not predict the next token."""
    return [run_stack(model, batch).float() for batch in calibration.held]


def distance(states: list[Tensor], goal: list[Tensor], shares: Shares = ALONE) -> float:
    """Return Σ ‖h − g‖² / Σ ‖g‖² over the states of all processes."""
    lost = sum(float((h - g.to(h)).square().sum()) for h, g in zip(states, goal, strict=True))
    sums = torch.tensor([lost, sum(float(g.square().sum()) for g in goal)], dtype=torch.float64)
    shares.total(sums)
    return float(sums[0] / sums[1].clamp(min=1e-30))


def _parts(batch: dict[str, Tensor], most: int) -> Iterable[dict[str, Tensor]]:
    """Yield a batch in parts of a limited number of tokens, but at least one row; whole if it has no tokens."""
    if "input_ids" not in batch:
        yield batch
        return
    rows, length = batch["input_ids"].shape
    step = max(1, most // max(length, 1))
    for start in range(0, rows, step):
        yield {name: value[start : start + step] for name, value in batch.items()}


def _scored(batch: Mapping[str, Tensor], has_memory: bool) -> int:
    """Return the number of a batch's tokens that the loss is a mean of."""
    if has_memory:
        return int((batch["labels"] != -100).sum())
    ids = batch["input_ids"]
    counts = batch["scored"] if "scored" in batch else torch.ones_like(ids, dtype=torch.bool)
    return int(counts[:, 1:].sum())
